"""Shards that do not belong together, or are made to lead astray."""

import io
import json
import struct
import tarfile

import numpy as np
import pytest
import yaml
from layouts import NAMES, WRITERS, opened
from safetensors.numpy import load, save
from test_data_shards import LIMIT, foreign, jpeg, sample, scanned, written

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.remote import ShardStore
from visiontrain.data.shard_index import index_bytes, read_index
from visiontrain.data.shards import braces

__all__ = ["jpeg"]  # a fixture


def renamed(index, names):
    """Change the names that an index has."""
    content = index.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["visiontrain"])
    head["names"] = names
    index.write_bytes(save(load(content), {"visiontrain": json.dumps(head)}))


def test_splits_whose_indices_name_other_classes_are_refused(tmp_path):
    written(WRITERS["yolo"](tmp_path / "set"), tmp_path / "tars")
    description = tmp_path / "tars" / "data.yaml"
    values = yaml.safe_load(description.read_text())
    del values["names"]
    description.write_text(yaml.safe_dump(values))
    spec = opened(tmp_path / "tars", tmp_path / "cache")
    assert spec.table("val").names == spec.names == NAMES
    renamed(tmp_path / "tars" / "val.safetensors", ["dog", "cat"])
    with pytest.raises(DataError, match=r"val\.safetensors: class 0 is 'dog', in train it is 'cat"):
        opened(tmp_path / "tars", tmp_path / "cache").table("val")
    renamed(tmp_path / "tars" / "val.safetensors", [*NAMES, "emu"])
    with pytest.raises(DataError, match="class 2 is 'emu', in train it is none; shard the splits"):
        opened(tmp_path / "tars", tmp_path / "cache").table("val")


def test_the_folder_that_one_is_in_can_be_written(tmp_path, monkeypatch):
    source = WRITERS["yolo"](tmp_path / "set")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert written(str(source), ".").folder == tmp_path / "empty"
    assert len(opened(tmp_path / "empty", tmp_path / "cache").table("train")) == 4


def test_rows_of_boxes_are_no_names_of_classes(tmp_path, jpeg):
    members = [
        *(("a.jpg", jpeg), ("a.txt", b"0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.1 0.1\n")),
        *(("b.jpg", jpeg), ("b.txt", b"0 0.5 0.5 0.1 -0.1")),
        *(("c.jpg", jpeg), ("c.txt", b"New York City Hall 1\n")),
    ]
    table = opened(foreign(tmp_path / "set", members), tmp_path / "cache").table("train")
    assert table.names == ("New York City Hall 1",)
    assert [(d.kind, d.file[-5:]) for d in table.defects] == [
        ("unreadable-labels", "a.txt"),
        ("unreadable-labels", "b.txt"),
    ]
    assert "write boxes as .json" in table.defects[0].reason


def test_room_for_copies_is_refused_where_nothing_is_copied(tmp_path):
    written(WRITERS["yolo"](tmp_path / "set"), tmp_path / "tars")
    with pytest.raises(ConfigError, match=r"data\.shard_cache_gb: 5\.0, but no tar of .* URL; lea"):
        opened(tmp_path / "tars", tmp_path / "cache", shard_cache_gb=5.0)


def test_tars_cut_otherwise_are_told_apart_since_epochs_have_another_order(tmp_path):
    tables = []
    for size in (0.004, 100):
        written(WRITERS["yolo"](tmp_path / f"set{size}"), tmp_path / f"{size}", shard_size=size)
        tables.append(opened(tmp_path / f"{size}", tmp_path / "cache").table("train"))
    few, one = tables
    assert len(few.windows.starts) > len(one.windows.starts)
    assert few.boxes.tolist() == one.boxes.tolist()
    assert few.digest() != one.digest()


def test_long_names_of_long_names_are_a_defect(tmp_path, jpeg):
    """tarfile goes one call deeper with each."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    deep = (info.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(tarfile.BLOCKSIZE, b"\0")) * 3000
    (tmp_path / "deep.tar").write_bytes(deep)
    assert [defect.kind for defect in scanned(tmp_path / "deep.tar").defects] == [
        "unreadable-shard"
    ]
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        sample(tar, "a.jpg", jpeg)
        sample(tar, "a.cls", b"0")
        end = tar.offset
    (tmp_path / "late.tar").write_bytes(file.getvalue()[:end] + deep)
    found = scanned(tmp_path / "late.tar")
    assert found.members == ["a.jpg"]
    assert [defect.kind for defect in found.defects] == ["truncated-shard"]


@pytest.mark.parametrize(
    "odd",
    [
        {"crowd": {"x": 1}},
        {"difficult": ["0"]},
        {"area": "9"},
        {"boxes": {"1234": 0}},
        {"boxes": ["1234"]},
        {"classes": "c"},
    ],
    ids=str,
)
def test_a_malformed_label_costs_its_own_sample_only(odd, tmp_path, jpeg):
    good = {"boxes": [[1, 2, 30, 40]], "classes": ["cat"], "crowd": [1], "difficult": [False]}
    members = [("a.jpg", jpeg), ("a.json", json.dumps(good | odd).encode())]
    members += [("b.jpg", jpeg), ("b.json", json.dumps(good).encode())]
    found = scanned(foreign(tmp_path / "set", members) / "train.tar")
    assert found.members == ["b.jpg"]
    assert (found.labels.crowd, found.labels.difficult) == ([True], [False])
    assert [(d.file, d.kind) for d in found.defects] == [("train.tar/a.json", "unreadable-labels")]


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("image_ids", lambda ids: ids[:-1], r"image_ids has \(3,\), not \(4,\)"),
        ("category_ids", lambda ids: ids[:1], r"category_ids has \(1,\), not \(2,\)"),
        ("boxes", lambda boxes: boxes.astype(np.int32), "boxes is of int32, not float32"),
        ("offsets", lambda places: places.astype(np.float32), "offsets is of float32, not int64"),
        ("crowd", lambda flags: flags.view(np.uint8), "crowd is of uint8, not bool"),
    ],
)
def test_arrays_of_other_lengths_and_types_are_refused(name, change, said, tmp_path):
    done = written(WRITERS["coco"](tmp_path / "set"), tmp_path / "tars")
    content = index_bytes(opened(tmp_path / "tars", tmp_path).read("train"))
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + length])["__metadata__"]
    arrays = load(content)
    path = tmp_path / "changed.safetensors"
    path.write_bytes(save(arrays | {name: change(arrays[name]).copy()}, head))
    with pytest.raises(DataError, match=said):
        read_index(path, done.tars["train"], ShardStore(tmp_path, 1), LIMIT)


def first_becomes(value):
    """Return what changes the first number of an array."""

    def change(array):
        array = array.copy()
        array.reshape(-1)[0] = value
        return array

    return change


BOXES = "a box lies outside of its image, or is empty"
WRONG_VALUES = {
    "a box's NaN": ("coco", "boxes", first_becomes(np.nan), BOXES),
    "a box before the image": ("coco", "boxes", first_becomes(-1), BOXES),
    "a box that ends early": ("coco", "boxes", first_becomes(63), BOXES),
    "a box past the image": ("coco", "boxes", lambda boxes: boxes + 40, BOXES),
    "an endless area": ("coco", "area", first_becomes(np.inf), "an area that is none"),
    "no pixels": ("coco", "sizes", first_becomes(0), "an image without pixels"),
    "no class": ("folder", "box_offsets", lambda _: np.array([0, 0, 2, 3, 4]), "than one class"),
    "an unknown kind": ("coco", "defects", [["a", None, "odd", "b"]], "a defect 'odd' that is not"),
    "no file": ("coco", "defects", [[1, None, "empty-box", "b"]], "'empty-box' .* of other types"),
    "no line": ("coco", "defects", [["a", "1", "empty-box", "b"]], "'empty-box' .* of other types"),
    "no kind": ("coco", "defects", [["a", 1, ["empty-box"], "b"]], "unhashable"),
    "no names": ("coco", "names", [1, 2], "names that are no texts"),
}


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_an_index_that_says_what_no_table_does_is_refused(case, tmp_path):
    layout, name, change, said = WRONG_VALUES[case]
    done = written(WRITERS[layout](tmp_path / "set"), tmp_path / "tars")
    content = (tmp_path / "tars/train.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["visiontrain"])
    arrays = load(content)
    if name in arrays:
        arrays[name] = change(arrays[name])
    else:
        head[name] = change
    path = tmp_path / "changed.safetensors"
    path.write_bytes(save(arrays, {"visiontrain": json.dumps(head)}))
    with pytest.raises(DataError, match=rf"no index of shards, or damaged \(.*{said}"):
        read_index(path, done.tars["train"], ShardStore(tmp_path, 1), LIMIT)


def test_a_kept_index_of_unknown_defects_is_made_anew(tmp_path, jpeg):
    folder = foreign(tmp_path / "set", [("a.jpg", jpeg), ("a.cls", b"0"), ("b.jpg", jpeg)])
    opened(folder, tmp_path / "cache").read("train")
    (kept,) = (tmp_path / "cache").glob("*.shards")
    kept.write_bytes(kept.read_bytes().replace(b"missing-label", b"missing-lapel"))
    (defect,) = opened(folder, tmp_path / "cache").table("train").defects
    assert defect.kind == "missing-label"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{000005..000002}.tar", r"^\{000005\.\.000002\}\.tar: no number from 5 to 2; swap them"),
        ("{0..999999}{0..999999}", "1,000,000,000,000 tars; give a pattern of at most 1,000,000"),
        ("{0..1000000}", "1,000,001 tars"),
    ],
)
def test_patterns_of_no_tar_or_too_many_are_refused(pattern, said):
    with pytest.raises(ConfigError, match=said):
        braces(pattern)


def test_patterns_stand_for_all_numbers_between():
    assert braces("{08..10}-{1..2}.tar") == [
        f"{k}-{m}.tar" for k in ("08", "09", "10") for m in (1, 2)
    ]


def test_what_contradicts_the_indices_is_refused(tmp_path):
    written(WRITERS["folder"](tmp_path / "set"), tmp_path / "tars")
    description = tmp_path / "tars/data.yaml"
    text = description.read_text()
    description.write_text(text + "several: false\n")
    assert not opened(description, tmp_path).table("train").several
    description.write_text(text + "several: true\n")
    with pytest.raises(
        ConfigError, match=r"several: True, but the index .*train\S+ says false; lea"
    ):
        opened(description, tmp_path)
    description.write_text(text.replace("index:", "index:\n  training: x.safetensors"))
    with pytest.raises(ConfigError, match="index: a file for 'training', which is no split here; "):
        opened(description, tmp_path)


def test_hidden_members_are_no_part_of_any_sample(tmp_path, jpeg):
    """As tars of macOS have them: before each file what is known of it."""
    members = [("._a.jpg", b"\0\5\x16\7"), ("a.jpg", jpeg), ("x/._a.cls", b"\0"), ("a.cls", b"1")]
    found = scanned(foreign(tmp_path / "set", members) / "train.tar")
    assert (found.members, found.tokens, found.defects) == (["a.jpg"], [1], [])


@pytest.mark.parametrize(
    ("pictures", "taken", "left"),
    [
        (["a.depth.png", "a.jpg"], "a.jpg", []),
        (["a.jpg", "a.depth.png"], "a.jpg", []),
        (["a.left.jpg", "a.right.jpg"], "a.left.jpg", []),
        (["a.depth.png", "a.jpg", "a.png"], "a.jpg", ["train.tar/a.png"]),
    ],
)
def test_of_several_pictures_the_plainly_named_is_the_image(pictures, taken, left, tmp_path, jpeg):
    members = [*((name, jpeg) for name in pictures), ("a.cls", b"1")]
    found = scanned(foreign(tmp_path / "set", members) / "train.tar")
    assert found.members == [taken]
    assert [(d.file, d.kind) for d in found.defects] == [(name, "extra-picture") for name in left]
