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

from visiontrain.core.errors import DataError
from visiontrain.data.remote import ShardStore
from visiontrain.data.shard_index import index_bytes, read_index

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
