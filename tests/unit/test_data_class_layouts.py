"""Folders and CSV files of classes that are not quite as one would lay them out."""

import os
import re
from pathlib import Path

import pytest
from layouts import LABELS, PICTURES, opened, save, write_csv, write_folder

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.walk import walk


def names(table):
    return sorted(Path(table.images.name(row)).name for row in range(len(table)))


def flat(root, *folders):
    """Put pictures into `folders` of `root` themselves."""
    for folder in folders:
        for picture in PICTURES:
            save(picture, root / folder)
    return root


@pytest.mark.parametrize("folders", [("train", "test"), ("train", "val"), ("Training", "dev")])
def test_splits_are_no_classes(folders, tmp_path):
    with pytest.raises(DataError, match=r"pictures in .*, but not in a folder for each class"):
        opened(flat(tmp_path / "set", *folders), tmp_path / "cache")


def test_a_train_among_vehicles_is_a_class(tmp_path):
    spec = opened(flat(tmp_path / "set", "bus", "train"), tmp_path / "cache")
    assert spec.names == ("bus", "train")


def test_a_val_without_folders_of_classes_is_no_reason_to_hold_pictures_out(tmp_path):
    root = tmp_path / "set"
    write_folder(root)
    (root / "val").rename(root / "other")
    flat(root, "val")
    with pytest.raises(DataError, match=r"set/val: pictures without folders of their classes"):
        opened(root, tmp_path / "cache")


def test_a_test_without_classes_is_left_alone(tmp_path):
    write_folder(tmp_path / "set")
    spec = opened(flat(tmp_path / "set", "test"), tmp_path / "cache")
    assert list(spec.splits) == ["train", "val"]


def test_a_val_of_one_class_is_scored(tmp_path):
    write_folder(tmp_path / "set")
    for file in (tmp_path / "set/val/dog").iterdir():
        file.unlink()
    spec = opened(tmp_path / "set", tmp_path / "cache")
    assert not any("no val" in note for note in spec.notes)
    assert spec.table("val").classes.tolist() == [0, 0]


@pytest.mark.parametrize("twin", ["dev", "VAL"])
def test_two_folders_of_one_split_are_refused(twin, tmp_path):
    root = tmp_path / "set"
    write_folder(root)
    save(PICTURES[0], root / twin / "cat")
    with pytest.raises(DataError, match=rf"set: .*{twin}.* are all val; name one"):
        opened(root, tmp_path / "cache")


def test_hidden_folders_are_no_data_and_those_with_an_underscore_are(tmp_path):
    root = tmp_path / "set"
    write_folder(root)
    for place in (".ipynb_checkpoints", "train/cat/.thumbs", "train/dog/@eaDir/a.jpg", "__MACOSX"):
        save(PICTURES[0], root / place)
    save(PICTURES[2], root / "train/_other")
    (root / "train/_notes").mkdir()
    spec = opened(root, tmp_path / "cache")
    assert spec.names == ("_other", "cat", "dog")
    assert names(spec.table("train")) == sorted(f"{name}.jpg" for name in [*LABELS, "c"])


def test_a_class_without_pictures_is_told(tmp_path):
    write_folder(tmp_path / "set")
    (tmp_path / "set/train/bird").mkdir()
    spec = opened(tmp_path / "set", tmp_path / "cache")
    assert spec.notes == (f"{tmp_path / 'set/train'}: no picture of bird",)


def test_names_of_any_bytes_are_held_out_too(tmp_path):
    root = tmp_path / "set"
    for label in ("cat", "dog"):
        for k in range(3):
            odd = os.fsdecode(b"caf\xe9%d.jpg" % k)
            save(PICTURES[k], root / label).rename(root / label / odd)
    spec = opened(root, tmp_path / "cache")
    assert len(spec.table("train")) + len(spec.table("val")) == 6


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    shut, scandir = str(tmp_path / "set/train/cat"), os.scandir

    def refused(path):
        if str(path) == shut:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    write_folder(tmp_path / "set")
    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(DataError, match=rf"{shut}: cannot be listed \(Permission denied\); let"):
        list(walk(tmp_path / "set"))


def described(tmp_path, text):
    write_folder(tmp_path / "set")
    (tmp_path / "data.yaml").write_text(f"format: folder\n{text}\n")
    return opened(tmp_path / "data.yaml", tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path: set\ntrain: [a, b]", r"train: got \['a', 'b'\]; give one folder"),
        ("path: set\ntrain: 5", "train: got 5; give one folder"),
        (
            "path: set\ntrain: train\nval: val\nholdout: 0.2",
            "holdout: 0.2, but val is given; leave",
        ),
        (
            "path: set\ntrain: train\nnames: [false, true]",
            "names: got .*put true, false, yes and no",
        ),
    ],
)
def test_what_a_description_cannot_mean_is_refused(text, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        described(tmp_path, text)


def test_folders_are_looked_for_where_other_data_sets_are(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONTRAIN_DATASETS", str(tmp_path / "all"))
    write_folder(tmp_path / "all/pets")
    spec = described(tmp_path, "train: pets/train\nval: pets/val")
    assert len(spec.table("val")) == len(LABELS)
    with pytest.raises(DataError, match=rf"nothing at .*{re.escape(str(tmp_path / 'all/none'))}"):
        described(tmp_path, "train: none")


# -- CSV files ---------------------------------------------------------------------------


def rewritten(tmp_path, text, more=""):
    """Return the data set whose train.csv holds `text`."""
    source = write_csv(tmp_path / "set")
    (tmp_path / "set/train.csv").write_text(text)
    Path(source).write_text(Path(source).read_text() + more)
    return opened(source, tmp_path / "cache")


LONG = "image,label\ntrain/a.jpg,cat\ntrain/b.jpg,dog\ntrain/a.jpg,dog\ntrain/b.jpg,dog\n"


def test_rows_that_give_an_image_two_classes_contradict_each_other(tmp_path):
    table = rewritten(tmp_path, LONG).table("train")
    assert table.classes.tolist() == [0, 1, 1]  # alike rows stay: seen more often
    (defect,) = table.defects
    assert (defect.kind, defect.line) == ("repeated-row", 4)
    assert "is of another class in" in defect.reason
    assert "train.csv:2; `several: true`" in defect.reason


def test_rows_of_an_image_of_several_classes_are_one(tmp_path):
    table = rewritten(tmp_path, LONG, "several: true\n").table("train")
    assert (len(table), table.offsets.tolist()) == (3, [0, 2, 3, 4])
    assert table.classes.tolist() == [0, 1, 1, 1]
    assert not table.defects


WIDE = ",image,cat,dog,valid,fold\n0,train/a.jpg,1,0,1,3\n1,train/b.jpg,0,1,0,2\n"


def test_columns_that_are_no_class_of_names_are_left_out_and_told(tmp_path):
    spec = rewritten(tmp_path, WIDE, "names: [cat, dog]\n")
    assert spec.table("train").classes.tolist() == [0, 1]
    assert f"{tmp_path / 'set/train.csv'}: columns left out: valid, fold" in spec.notes
    with pytest.raises(DataError, match=r"train.csv:2: fold: got '3'; give 0 or 1, .*names:"):
        rewritten(tmp_path, WIDE)


def test_a_column_of_classes_under_another_name_is_told_what_to_be_called(tmp_path):
    with pytest.raises(DataError, match=r"breed: got 'boxer'; give 0 or 1, call the column of cla"):
        rewritten(tmp_path, "image,breed\ntrain/a.jpg,boxer\n")


def test_columns_beside_the_label_are_told(tmp_path):
    spec = rewritten(tmp_path, "image,label,split\ntrain/a.jpg,cat,x\ntrain/b.jpg,dog,y\n")
    assert spec.notes == (f"{tmp_path / 'set/train.csv'}: columns left out: split",)
