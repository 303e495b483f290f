"""Tars at URLs: fetched once, when first read, into a folder of bounded size."""

import io
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml
from layouts import WRITERS, opened

from visiontrain.core.errors import ConfigError, DataError, FetchError
from visiontrain.data import remote
from visiontrain.data.config import DataConfig, NoAugment, ShardingConfig
from visiontrain.data.loader import Plan, train_steps
from visiontrain.data.order import order_of
from visiontrain.data.remote import GB, ShardStore
from visiontrain.data.samples import training_set
from visiontrain.data.sharding import shard


def put(path, data):
    with fsspec.open(path, "wb") as file:
        file.write(data)


@pytest.fixture
def sharded(tmp_path):
    """A description here whose tars are elsewhere, and the same data in files."""
    source = WRITERS["yolo"](tmp_path / "set")
    out = tmp_path / "tars"
    shard(ShardingConfig(data=DataConfig(source=source), out=str(out), shard_size=0.004))
    values = yaml.safe_load((out / "data.yaml").read_text())
    for tar in out.glob("*.tar"):
        put(f"memory://{tmp_path.name}/{tar.name}", tar.read_bytes())
        tar.rename(tmp_path / tar.name)
    for split in ("train", "val"):
        values[split] = f"memory://{tmp_path.name}/{values[split]}"
    (out / "data.yaml").write_text(yaml.safe_dump(values))
    return out


def copies(cache):
    return sorted(p.name for p in (cache / "shards").glob("*.tar"))


def test_nothing_is_fetched_before_a_sample_is_read_and_then_its_tar_only(sharded, tmp_path):
    table = opened(sharded, tmp_path / "cache").table("train")
    assert not (tmp_path / "cache" / "shards").exists()
    images = [table.images.read(0)]
    assert [name[17:] for name in copies(tmp_path / "cache")] == ["train-000000.tar"]
    images += [table.images.read(row) for row in range(1, len(table))]
    assert len(copies(tmp_path / "cache")) == len(table.images.tars)
    for image, size in zip(images, table.sizes, strict=True):
        assert image.shape == (*size[::-1], 3)


def test_tars_of_others_at_urls_are_fetched_to_be_read_through(sharded, tmp_path):
    indexed = opened(sharded, tmp_path / "cache").table("train")
    without_index(sharded)
    table = opened(sharded, tmp_path / "cache").table("train")
    assert np.array_equal(table.boxes, indexed.boxes)
    assert np.array_equal(table.images.offsets, indexed.images.offsets)


def test_the_copies_unused_for_longest_make_room(tmp_path):
    for name in "abc":
        put(f"memory://room/{name}.tar", bytes(1000))
    store = ShardStore(tmp_path, 2500 / GB)
    first = {name: Path(store.local(f"memory://room/{name}.tar")) for name in "ab"}
    os.utime(first["a"], (1, 1))
    os.utime(first["b"], (2, 2))
    store.local("memory://room/a.tar")  # used just now
    store.local("memory://room/c.tar", 1000)
    assert {name[17:] for name in copies(tmp_path)} == {"a.tar", "c.tar"}


def test_a_copy_that_is_removed_between_reads_is_fetched_again(sharded, tmp_path):
    table = opened(sharded, tmp_path / "cache", shard_cache_gb=1e-9).table("train")
    for row in [*range(len(table)), *range(len(table))]:
        assert table.images.read(row).shape[1::-1] == tuple(table.sizes[row])
        assert len(copies(tmp_path / "cache")) == 1
    notes = opened(sharded, tmp_path / "cache", shard_cache_gb=1e-9).notes
    assert "would be fetched again and again; raise it, or lower data.window" in notes[0]


def without_index(folder):
    values = yaml.safe_load((folder / "data.yaml").read_text())
    del values["index"]
    (folder / "data.yaml").write_text(yaml.safe_dump(values))


def test_a_copy_that_is_removed_before_it_is_opened_is_fetched_again(
    sharded, tmp_path, monkeypatch
):
    """What a thread that makes room does to another, at each tar."""
    indexed = opened(sharded, tmp_path / "cache").table("train")
    without_index(sharded)
    whole, seen = ShardStore.local, set()

    def removed_once(store, place, size=None):
        path = whole(store, place, size)
        if place not in seen:
            Path(path).unlink()
        seen.add(place)
        return path

    monkeypatch.setattr(ShardStore, "local", removed_once)
    table = opened(sharded, tmp_path / "cache").table("train")
    assert len(seen) > 1
    assert not table.defects
    assert np.array_equal(table.images.offsets, indexed.images.offsets)


def test_a_copy_that_is_removed_each_time_stops(tmp_path, monkeypatch):
    put("memory://removed/a.tar", bytes(10))
    monkeypatch.setattr(ShardStore, "local", lambda *_: str(tmp_path / "none"))
    with pytest.raises(FetchError, match=r"a\.tar: its copy was removed .*; raise data\.shard_ca"):
        ShardStore(tmp_path, 1).open("memory://removed/a.tar")
    with pytest.raises(FileNotFoundError):
        ShardStore(tmp_path, 1).open(str(tmp_path / "none"))


def test_a_signature_is_fetched_with_and_no_part_of_names(sharded, tmp_path):
    plain = opened(sharded, tmp_path / "cache").table("train")
    signature = "?X-Amz-Signature=" + "a/b" * 200
    for tar in tmp_path.glob("*.tar"):
        put(f"memory://{tmp_path.name}/signed/{tar.name}{signature}", tar.read_bytes())
    values = yaml.safe_load((sharded / "data.yaml").read_text())
    for split in ("train", "val"):
        name = values[split].rpartition("/")[2]
        values[split] = f"memory://{tmp_path.name}/signed/{name}{signature}"
    (sharded / "data.yaml").write_text(yaml.safe_dump(values))
    table = opened(sharded, tmp_path / "signed").table("train")
    assert np.array_equal(table.images.read(0), plain.images.read(0))
    assert [name[17:] for name in copies(tmp_path / "signed")] == ["train-000000.tar"]
    long = f"memory://{tmp_path.name}/" + "\u4e2d" * 300 + ".tar"
    put(long, b"long")
    assert Path(ShardStore(tmp_path, 1).local(long)).read_bytes() == b"long"


def test_a_copy_of_another_size_than_wanted_is_fetched_again(tmp_path):
    store, place = ShardStore(tmp_path, 1), "memory://changed/a.tar"
    put(place, bytes(5))
    store.local(place)
    put(place, bytes(7))
    assert Path(store.local(place)).stat().st_size == 5  # any will do
    assert Path(store.local(place, 7)).stat().st_size == 7


def read_all(sharded, cache, start, counts):
    table = opened(sharded, cache).table("train")
    start.wait()
    for row in range(len(table)):
        table.images.read(row)
    counts.put(len(list((Path(cache) / "shards").glob("*.tar"))))


def test_processes_that_want_the_same_tar_fetch_it_once(sharded, tmp_path, monkeypatch):
    """Each opening of a source appends a byte to a file, across processes."""
    values = yaml.safe_load((sharded / "data.yaml").read_text())
    values["train"] = f"file://{tmp_path}/" + values["train"].rpartition("/")[2]
    (sharded / "data.yaml").write_text(yaml.safe_dump(values))
    whole, log = fsspec.open, tmp_path / "log"

    def logged(place, mode):
        with log.open("a") as file:
            file.write("x")
        return whole(place, mode)

    monkeypatch.setattr(fsspec, "open", logged)
    context = multiprocessing.get_context("fork")
    start, counts = context.Event(), context.Queue()
    arguments = (sharded, tmp_path / "cache", start, counts)
    others = [context.Process(target=read_all, args=arguments) for _ in range(3)]
    for other in others:
        other.start()
    start.set()
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    tars = len(copies(tmp_path / "cache"))
    assert len(log.read_text()) == tars


def test_threads_fetch_once_too(tmp_path, monkeypatch):
    put("memory://threads/a.tar", bytes(10))
    calls, whole = [], fsspec.open
    monkeypatch.setattr(fsspec, "open", lambda *args: calls.append(args) or whole(*args))
    store = ShardStore(tmp_path, 1)
    threads = [
        threading.Thread(target=store.local, args=("memory://threads/a.tar",)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tar_that_is_gone_ends_the_run_and_is_not_replaced(
    workers, sharded, tmp_path, monkeypatch
):
    monkeypatch.setattr(remote, "TRIES", 1)
    table = opened(sharded, tmp_path / "cache").table("train")
    fsspec.filesystem("memory").rm(table.images.tars[-1])
    order = order_of(DataConfig(), table)
    data = training_set(table, 32, NoAugment(), seed=0, epochs=1, order=order)
    with pytest.raises(FetchError, match="cannot be fetched"):
        list(train_steps(data, Plan(2, 1, 0, workers=workers), 0))


@pytest.mark.parametrize("size", [None, 1000])
def test_no_more_is_fetched_than_was_announced_or_may_be_kept(size, tmp_path, monkeypatch):
    """Of a source without an end, at the first try."""
    opened_, read = [], []

    class Endless(io.RawIOBase):
        def read(self, size=-1):
            read.append(size)
            return bytes(size)

    monkeypatch.setattr(fsspec, "open", lambda *_: opened_.append(1) or Endless())
    store = ShardStore(tmp_path, 3 * remote.CHUNK / GB)
    said = "its index says 1,000" if size else r"3,145,728 bytes; raise data\.shard_cache_gb"
    with pytest.raises(FetchError, match=f"memory://endless/a.tar: has more than .*{said}"):
        store.local("memory://endless/a.tar", size)
    assert (len(opened_), len(read)) == (1, 1 if size else 4)
    assert [path.suffix for path in (tmp_path / "shards").iterdir()] == [".lock"]


@pytest.mark.parametrize("indexed", [True, False])
def test_what_is_kept_of_an_index_is_named_when_its_tars_are_others(indexed, sharded, tmp_path):
    """A copy of an index at a URL, or what reading through the tars gave."""
    cache, values = tmp_path / "cache", yaml.safe_load((sharded / "data.yaml").read_text())
    if indexed:
        for split, name in values["index"].items():
            values["index"][split] = f"memory://{tmp_path.name}/{name}"
            put(values["index"][split], (sharded / name).read_bytes())
        (sharded / "data.yaml").write_text(yaml.safe_dump(values))
    else:
        without_index(sharded)
        opened(sharded, cache).table("train")
    for copy in (cache / "shards").glob("*.tar"):
        copy.unlink()
    table = opened(sharded, cache).table("train")
    put(table.images.tars[0], bytes(100))
    with pytest.raises(FetchError, match=r"has 100 bytes, its index says .*; delete ") as error:
        table.images.read(0)
    kept = Path(str(error.value).partition("; delete ")[2].partition(", where that is kept")[0])
    assert kept.is_relative_to(cache)
    kept.unlink()
    spec = opened(sharded, cache)
    if not indexed:  # it is read through again, and the tar is seen to be none
        assert "unreadable-shard" in [defect.kind for defect in spec.read("train").defects]
    assert kept.is_file() == indexed  # it was fetched anew


def test_what_cannot_be_fetched_is_told_in_one_line_and_stops(tmp_path, monkeypatch):
    store = ShardStore(tmp_path, 1, pause_s=0)
    with pytest.raises(FetchError, match=r"memory://none/a\.tar: cannot be fetched \(FileNotFo"):
        store.local("memory://none/a.tar")
    put("memory://short/a.tar", bytes(5))
    with pytest.raises(FetchError, match="has 5 bytes, its index says 7; index it anew"):
        store.local("memory://short/a.tar", 7)
    with pytest.raises(ConfigError, match="a chain of URLs; give a single one"):
        store.local("simplecache::memory://short/a.tar")
    with pytest.raises(FetchError, match="has more than 3 bytes, its index says 3; index it"):
        store.local("memory://short/a.tar", 3)
    assert not copies(tmp_path)
    assert not issubclass(FetchError, DataError)  # a reader would take the next image instead
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"pip install 'visiontrain\[remote\]'"):
        store.local("memory://short/a.tar")
