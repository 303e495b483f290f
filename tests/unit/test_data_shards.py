"""Shards: what is written is what is read, with the index and without; damage has a name."""

import io
import json
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import NAMES, PICTURES, WRITERS, opened, pixels, save

from visiontrain.cli import main
from visiontrain.core.errors import ConfigError, DataError, StorageError
from visiontrain.data import shard_writer, shards
from visiontrain.data.check import check
from visiontrain.data.config import DataConfig, ShardingConfig
from visiontrain.data.defects import describe, fatal
from visiontrain.data.images import FileImages
from visiontrain.data.remote import ShardStore
from visiontrain.data.shard_index import index_bytes, read_index
from visiontrain.data.sharding import shard
from visiontrain.data.table import Defect
from visiontrain.data.tar_scan import scan_tar
from visiontrain.metrics.classification import truth

LIMIT = 10**6
ARRAYS = ("sizes", "offsets", "boxes", "classes", "crowd", "difficult", "area")


def rich_coco(root):
    """COCO's layout with a crowd, and an area that is not the box's."""
    source = Path(WRITERS["coco"](root))
    content = json.loads(source.read_text())
    content["annotations"][0] |= {"iscrowd": 1, "area": 8.1}
    source.write_text(json.dumps(content))
    return str(source)


def rich_voc(root):
    """VOC's layout with a difficult object."""
    source = Path(WRITERS["voc"](root))
    file = source / "Annotations" / "a.xml"
    text = file.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>", 1)
    file.write_text(text)
    return str(source)


def many_labels(root):
    source = WRITERS["csv"](root)
    for split in ("train", "val"):
        lines = (root / f"{split}.csv").read_text().replace("b.jpg,dog", "b.jpg,cat|dog")
        (root / f"{split}.csv").write_text(lines.replace("c.jpg,dog", "c.jpg,"))
    return source


SOURCES = WRITERS | {"coco": rich_coco, "voc": rich_voc, "csv": many_labels}


def written(source, out, **keys):
    data = keys.pop("data", {})
    keys = {"shard_size": 0.004, "shuffle": False} | keys
    return shard(ShardingConfig(data=DataConfig(source=source, **data), out=str(out), **keys))


def without_index(folder, **changed):
    """Let the tars be all there is, as in somebody else's data set."""
    file = folder / "data.yaml"
    values = yaml.safe_load(file.read_text())
    del values["index"]
    file.write_text(yaml.safe_dump(values | changed))
    for index in folder.glob("*.safetensors"):
        index.unlink()


def assert_same(one, two):
    assert (one.names, one.task, one.several) == (two.names, two.task, two.several)
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    for name in ("image_ids", "category_ids"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None and b is None) or np.array_equal(a, b), name
    for row in range(len(one)):
        assert np.array_equal(one.images.read(row), two.images.read(row))


@pytest.mark.parametrize("kind", SOURCES)
def test_what_is_written_is_what_is_read_with_the_index_and_without(kind, tmp_path):
    source = SOURCES[kind](tmp_path / "set")
    before = opened(source, tmp_path / "cache").table("train")
    done = written(source, tmp_path / "tars")
    after = opened(tmp_path / "tars", tmp_path / "cache").table("train")
    assert_same(before, after)
    assert after.windows is not None
    if isinstance(before.images, FileImages):
        for row, path in enumerate(before.images.paths):
            assert after.images.read_bytes(row) == Path(path).read_bytes()
    assert len(done.tars["train"]) > 1
    without_index(tmp_path / "tars")
    for _ in range(2):  # read through, then from the kept index
        scanned = opened(tmp_path / "tars", tmp_path / "cache").table("train")
        assert_same(replace(after, category_ids=None), scanned)
        assert not scanned.defects


def test_the_same_data_give_the_same_bytes_mixed_once(tmp_path):
    for name in ("one", "two"):
        written("digits", tmp_path / name, data={"train_images": 30, "val_images": 5}, shuffle=True)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    plain = opened("digits", tmp_path, train_images=30).table("train")
    mixed = opened(tmp_path / "one", tmp_path).table("train")
    assert not np.array_equal(plain.offsets, mixed.offsets)
    assert sorted(np.diff(plain.offsets)) == sorted(np.diff(mixed.offsets))


def test_a_used_folder_and_one_in_the_data_are_refused(tmp_path):
    source = WRITERS["yolo"](tmp_path / "set")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(ConfigError, match=r"out: .*used is not empty; name another folder"):
        written(source, tmp_path / "used")
    with pytest.raises(ConfigError, match=r"out: .*file is a file; name a folder"):
        written(source, tmp_path / "used" / "file")
    with pytest.raises(ConfigError, match=r"out: .* lies in the data set's folder"):
        written(source, tmp_path / "set" / "tars")
    (tmp_path / "empty").mkdir()
    written(source, tmp_path / "empty")


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_stops_half_way_leaves_nothing(error, tmp_path, monkeypatch):
    source = WRITERS["yolo"](tmp_path / "set")
    whole = shard_writer.encoded

    def stops(images, row):
        if row == 2:
            raise error
        return whole(images, row)

    monkeypatch.setattr(shard_writer, "encoded", stops)
    with pytest.raises((KeyboardInterrupt, StorageError)):
        written(source, tmp_path / "new" / "tars")
    assert not list((tmp_path / "new").iterdir())


def sample(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def foreign(folder, members, split="train"):
    """Write somebody's tar: (name, bytes) each, or a ready header."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{split}.tar", "w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                sample(tar, *member)
    text = {"format": "shards", split: f"{split}*.tar"}
    (folder / "data.yaml").write_text(yaml.safe_dump(text))
    return folder


@pytest.fixture
def jpeg(tmp_path):
    return save(PICTURES[0], tmp_path / "pictures").read_bytes()


def test_labels_of_others_are_read_by_name_number_and_json(tmp_path, jpeg):
    members = [("x/a.jpg", jpeg), ("x/a.txt", b"dog\n"), ("x/b.JPEG", jpeg), ("x/b.txt", b"cat")]
    table = opened(foreign(tmp_path / "one", members), tmp_path / "cache").table("train")
    assert (table.names, table.classes.tolist(), table.several) == (NAMES, [1, 0], False)
    members = [("a.cls", b"2"), ("a.jpg", jpeg), ("b.jpg", jpeg), ("b.json", b'{"label": 0}')]
    spec = opened(foreign(tmp_path / "two", members), tmp_path / "cache")
    table = spec.table("train")
    assert (table.names, table.classes.tolist()) == (("class0", "class1", "class2"), [2, 0])
    assert table.images.name(0).endswith("two/train.tar/a.jpg")


def scanned(tar):
    return scan_tar(lambda: os.open(tar, os.O_RDONLY), "train.tar", LIMIT)


class Trap:
    def __reduce__(self):
        return exec, ("raise AssertionError('unpickled')",)


def test_every_damage_has_a_name_and_pickles_are_never_decoded(tmp_path, jpeg):
    link = tarfile.TarInfo("l.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    one = b'{"boxes": [[1, 2, 30, 40]], "classes": ["cat"]}'
    members = [
        *[("a.jpg", jpeg), ("a.json", one), ("a.pyd", pickle.dumps(Trap()))],
        *[("b.jpg", jpeg), ("b.pth", pickle.dumps(Trap()))],
        *[("../c.jpg", jpeg), ("/d.jpg", jpeg), link],
        *[("e.jpg", jpeg[: len(jpeg) // 2]), ("e.json", one)],
        *[("f.jpg", jpeg), ("f.json", b"[" * 100_000)],
        *[("g.jpg", jpeg), ("g.json", b'{"boxes": [[1, 2]], "classes": [0]}')],
        *[("h.jpg", b"none"), ("h.json", one)],
        *[("i.jpg", jpeg), ("i.cls", b"cat")],
        *[("j.json", one), ("k.bin", b"")],
        *[("m.jpg", jpeg), ("m.json", b'{"boxes": [[NaN, 2, 3, 4]], "classes": ["cat"]}')],
        ("n.jpg", jpeg),
    ]
    table = opened(foreign(tmp_path / "set", members), tmp_path / "cache").table("train")
    found = {defect.file.rpartition("/")[2]: defect.kind for defect in table.defects}
    assert found == {
        "train.tar": "pickled-member",
        "b.jpg": "missing-label",
        "c.jpg": "unsafe-member",
        "d.jpg": "unsafe-member",
        "l.jpg": "unsafe-member",
        "e.jpg": "truncated-image",
        "f.json": "unreadable-labels",
        "g.json": "unreadable-labels",
        "h.jpg": "unknown-format",
        "i.jpg": "unreadable-labels",
        "j": "missing-image",
        "m.jpg": "nonfinite-box",
        "n.jpg": "missing-label",
    }
    assert [Path(table.images.name(row)).name for row in range(len(table))] == ["a.jpg", "m.jpg"]
    pickled = next(d.reason for d in table.defects if d.kind == "pickled-member")
    assert pickled == "1 .pth, 1 .pyd: never decoded, they could run code"


def test_a_class_that_is_not_named_stops(tmp_path, jpeg):
    folder = foreign(tmp_path / "set", [("a.jpg", jpeg), ("a.cls", b"7")])
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").write_text(text + "names: [cat, dog]\n")
    with pytest.raises(DataError, match=r"a\.jpg: class 7 is none of cat, dog"):
        opened(folder, tmp_path / "cache").table("train")


def test_no_tar_no_data_and_compressed_ones_are_told_in_one_line(tmp_path):
    (tmp_path / "data.yaml").write_text("format: shards\ntrain: x-*.tar\n")
    with pytest.raises(DataError, match=r"train: no tar at .*x-\*\.tar; correct the path"):
        opened(tmp_path, tmp_path / "cache")
    with tarfile.open(tmp_path / "x-0.tar", "w:gz"):
        pass
    spec = opened(tmp_path, tmp_path / "cache")
    with pytest.raises(DataError, match=r"no usable image: 1 unreadable-shard.*decompress it"):
        spec.table("train")


def test_a_tar_that_is_cut_or_gone_costs_its_own_images_only(tmp_path):
    source = WRITERS["yolo"](tmp_path / "set")
    done = written(source, tmp_path / "tars", data={})
    whole = opened(tmp_path / "tars", tmp_path / "cache").table("train")
    tar = tmp_path / "tars" / done.tars["train"][0]
    held = int(whole.images.starts[1])
    data = tar.read_bytes()
    tar.write_bytes(data[: int(whole.images.offsets[held - 1])])
    cut = opened(tmp_path / "tars", tmp_path / "cache").table("train")
    assert len(cut) == len(whole) - 1
    assert [defect.kind for defect in cut.defects] == ["truncated-shard"]
    tar.write_bytes(data + bytes(512))
    assert opened(tmp_path / "tars", tmp_path).read("train").defects[0].kind == "unreadable-shard"
    tar.unlink()
    gone = opened(tmp_path / "tars", tmp_path / "cache").table("train")
    assert len(gone) == len(whole) - held
    assert [defect.kind for defect in gone.defects] == ["unreadable-shard"]


@settings(max_examples=80)
@given(data=st.data())
def test_no_damage_to_a_tar_raises(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tar")
    jpeg = save(PICTURES[3], folder).read_bytes()
    members = [("a.jpg", jpeg), ("a.cls", b"1"), ("b.jpg", jpeg), ("b.json", b'{"classes": [0]}')]
    tar = foreign(folder, members) / "train.tar"
    content = bytearray(tar.read_bytes()[:6000])
    for place, byte in data.draw(st.lists(st.tuples(st.integers(0, 5999), st.integers(0, 255)))):
        content[place % len(content)] = byte
    tar.write_bytes(content[: data.draw(st.integers(0, 6000))])
    found = scanned(tar)
    assert len(found.members) <= 2
    assert all(o + n <= found.size for o, n in zip(found.offsets, found.lengths, strict=True))


@settings(max_examples=150)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.integers(0, 3000))
def test_a_damaged_index_is_a_data_error_or_a_table_like_any(place, byte, cut, damaged):
    file, content, tars = damaged
    changed = bytearray(content)
    changed[place % len(changed)] = byte
    file.write_bytes(changed[: len(changed) - (cut if cut < 100 else 0)])
    try:
        table = read_index(file, tars, ShardStore(file.parent, 1), LIMIT)
    except DataError as error:
        assert str(error).count("\n") == 0
        return
    assert table.offsets[-1] == len(table.boxes)
    [table.targets(row) for row in range(len(table))]
    limits = np.repeat(table.sizes, np.diff(table.offsets), axis=0)
    assert (table.sizes > 0).all()
    assert ((table.boxes >= 0).all(1) & (table.boxes[:, 2:] <= limits).all(1)).all()
    assert table.task == "detect" or table.several or len(truth(table)) == len(table.classes)
    fatal(table.defects, strict=True)
    [describe(defect) for defect in table.defects]


@pytest.fixture(scope="module", params=["yolo", "folder"])
def damaged(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    source = WRITERS[request.param](folder / "set")
    done = written(source, folder / "tars")
    table = opened(folder / "tars", folder).read("train")
    defects = [Defect("train.tar", None, "truncated-shard", "x"), Defect("a", 3, "empty-box", "y")]
    content = index_bytes(replace(table, defects=defects))
    return folder / "copy.safetensors", content, done.tars["train"]


def test_tars_are_read_through_once_and_again_when_they_change(tmp_path, jpeg, monkeypatch):
    folder = foreign(tmp_path / "set", [("a.jpg", jpeg), ("a.cls", b"0")])
    calls = []
    whole = scan_tar

    def counted(*arguments):
        calls.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(shards, "scan_tar", counted)
    for _ in range(3):
        assert len(opened(folder, tmp_path / "cache").table("train")) == 1
    assert len(calls) == 1
    foreign(folder, [("a.jpg", jpeg), ("a.cls", b"0"), ("b.jpg", jpeg), ("b.cls", b"1")])
    assert len(opened(folder, tmp_path / "cache").table("train")) == 2


def test_check_sees_the_same_picture_in_two_splits(tmp_path):
    source = WRITERS["coco"](tmp_path / "set")  # whose splits are the same pictures
    written(source, tmp_path / "tars")
    spec = opened(tmp_path / "tars", tmp_path / "cache")
    report = check(spec, list(spec.splits))
    assert report.trainable
    assert [d.kind for d in report.splits[1].defects] == ["duplicate-image"] * 4
    assert "tars/train-000000.tar/000000.jpg in train" in report.splits[1].defects[0].reason


def test_single_cls_makes_two_classes_of_one_place_one_box(tmp_path):
    source = WRITERS["yolo"](tmp_path / "set")
    label = tmp_path / "set/labels/train/d.txt"
    label.write_text(label.read_text() + label.read_text().replace("0", "1", 1))
    written(source, tmp_path / "tars")
    for where in (source, tmp_path / "tars"):
        one = opened(where, tmp_path / "cache", single_cls=True).table("train")
        assert np.diff(one.offsets).tolist() == [2, 1, 0, 1]
    assert len(opened(tmp_path / "tars", tmp_path / "cache").table("train").boxes) == 5


def test_keys_of_shards_are_refused_elsewhere(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.window: 4, but data=digits is digits, not sha"):
        opened("digits", tmp_path, window=4)


def test_the_verb_writes_and_says_what_to_do_next(tmp_path, capsys):
    out = tmp_path / "tars"
    words = ["data", "shard", "data=digits", "data.train_images=3", "split=train", f"out={out}"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines() == [
        "digits: train: no box of 1, 4, 5",
        "train: 3 images in 1 tar",
        f"{out}: 0.2 MB; train with data={out}",
    ]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        f"visiontrain: out: {out} is not empty; name another folder\n"
    )
    assert main(["data", "cut"]) == 2
    assert capsys.readouterr().err == "visiontrain: data: cut; write data shard KEY=VALUE\n"


def test_pixels_are_the_pictures(tmp_path):
    written(WRITERS["yolo"](tmp_path / "set"), tmp_path / "tars")
    image = opened(tmp_path / "tars", tmp_path).table("val").images.read(0)
    assert np.abs(image[..., ::-1].astype(int) - pixels(PICTURES[0], 1)).mean() < 8
