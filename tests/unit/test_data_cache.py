"""Caches: the same pixels, complete or absent, and never in the way."""

import os
import pickle

import numpy as np
import pytest
from layouts import PICTURES, opened, save, write_yolo

from visiontrain.core.errors import DataError
from visiontrain.data import scan as scanning
from visiontrain.data.cache import DiskCache, RamCache
from visiontrain.data.header import ImageError
from visiontrain.data.images import FileImages, Paths

LIMIT = 10**6
SIZES = np.array([picture.size for picture in PICTURES], np.int32)


@pytest.fixture
def source(tmp_path):
    files = [save(picture, tmp_path / "images") for picture in PICTURES]
    return FileImages(Paths(files), LIMIT)


class Counting:
    """An ImageSource that counts its reads."""

    def __init__(self, source):
        self.source = source
        self.reads = 0

    def __len__(self):
        return len(self.source)

    def name(self, row):
        return self.source.name(row)

    def read(self, row):
        self.reads += 1
        return self.source.read(row)


def same(one, two):
    return all(np.array_equal(one.read(row), two.read(row)) for row in range(len(one)))


def test_ram_decodes_once_into_one_buffer(source):
    counting = Counting(source)
    cache = RamCache(counting, SIZES)
    assert counting.reads == len(source)
    assert same(cache, source)
    assert counting.reads == len(source)
    assert cache.pixels.nbytes == sum(w * h * 3 for w, h in SIZES.tolist())
    cache.read(0)[:] = 0  # a copy: whoever draws on it spoils nothing
    assert same(cache, source)


def test_disk_decodes_once_for_all_runs(source, tmp_path):
    folder = tmp_path / "cache"
    first = DiskCache(source, SIZES, folder, "key")
    counting = Counting(source)
    second = DiskCache(counting, SIZES, folder, "key")
    assert same(first, source)
    assert same(second, source)
    assert counting.reads == 0
    assert [file.name for file in folder.iterdir()] == ["images-key.u8"]
    worker = pickle.dumps(second)
    assert len(worker) < 5_000
    assert same(pickle.loads(worker), source)


@pytest.mark.parametrize("kind", [RamCache, lambda *a: DiskCache(*a, a[0].folder, "key")])
def test_an_unreadable_image_stays_an_error(kind, source, tmp_path):
    source.folder = tmp_path / "cache"
    broken = source.paths[1]
    os.truncate(broken, 300)
    cache = kind(source, SIZES)
    with pytest.raises(ImageError, match=r"b\.jpg"):
        cache.read(1)
    assert np.array_equal(cache.read(2), source.read(2))


def flip(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def test_damage_to_a_cache_file_is_noticed(source, tmp_path):
    file = DiskCache(source, SIZES, tmp_path, "key").path
    flip(file, -1)  # a pixel of the last image
    assert same(DiskCache(source, SIZES, tmp_path, "key"), source)
    for place in (0, 70):  # the magic, the head: written again
        flip(file, place)
        assert same(DiskCache(source, SIZES, tmp_path, "key"), source)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert same(DiskCache(source, SIZES, tmp_path, "key"), source)
    assert file.read_bytes() == whole


def test_a_changed_image_is_cached_anew(tmp_path):
    data = write_yolo(tmp_path / "set")
    cache = tmp_path / "cache"
    before = opened(data, cache, cache="disk").table("train").images.read(0)
    file = save(PICTURES[0], tmp_path / "set/images/train", seed=9)
    os.utime(file, ns=(1, 1))
    after = opened(data, cache, cache="disk").table("train").images
    assert not np.array_equal(after.read(0), before)
    assert np.array_equal(after.read(0), opened(data, cache).table("train").images.read(0))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(source, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot write .*No space left.*data.cache_dir"):
        DiskCache(source, SIZES, tmp_path / "cache", "key")
    assert not list((tmp_path / "cache").iterdir())


def test_a_scan_is_remembered_until_a_file_changes(source, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "REMEMBERED", 2)
    folder = tmp_path / "cache"
    file = tmp_path / "images/b.jpg"
    file.write_bytes(file.read_bytes()[:-2])
    first = scanning.scan(source.paths, LIMIT, folder)
    assert first.sizes.tolist() == SIZES.tolist()
    with monkeypatch.context() as patch:
        patch.setattr(scanning, "look", None)  # would fail if it were called
        again = scanning.scan(source.paths, LIMIT, folder)
    assert np.array_equal(again.sizes, first.sizes)
    assert again.defects == first.defects
    assert [defect.kind for defect in first.defects] == ["missing-end"]
    save(PICTURES[1], tmp_path / "images")
    assert not scanning.scan(source.paths, LIMIT, folder).defects
    for kept in folder.iterdir():
        kept.write_bytes(kept.read_bytes()[:50])
    assert scanning.scan(source.paths, LIMIT, folder).sizes.tolist() == SIZES.tolist()


def test_an_error_of_the_system_is_not_remembered(source, tmp_path, monkeypatch):
    monkeypatch.setattr(scanning, "REMEMBERED", 2)
    look = scanning.look_into

    def unreachable(file, name, max_pixels):
        if name.endswith("b.jpg"):
            raise OSError(5, "Input/output error")
        return look(file, name, max_pixels)

    with monkeypatch.context() as patch:
        patch.setattr(scanning, "look_into", unreachable)
        first = scanning.scan(source.paths, LIMIT, tmp_path / "cache")
    assert [defect.kind for defect in first.defects] == ["corrupt-image"]
    assert scanning.scan(source.paths, LIMIT, tmp_path / "cache").sizes.tolist() == SIZES.tolist()
