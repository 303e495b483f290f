"""Folders and CSV files of classes that are not quite as one would lay them out."""

import os
import re
from pathlib import Path

import pytest
from layouts import LABELS, PICTURES, opened, save, write_csv, write_folder

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.inputs import find_inputs
from visiontrain.data.walk import walk
from visiontrain.report.detections import write_json


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


def test_a_split_beside_classes_is_no_class(tmp_path):
    write_folder(tmp_path / "set")
    root = flat(tmp_path / "set", "cat", "dog")
    (root / "train").rename(tmp_path / "other")
    with pytest.raises(DataError, match=r"set: the classes cat, dog, and val with folders of cla"):
        opened(root, tmp_path / "cache")


def test_classes_that_are_only_to_be_scored_are_all_scored(tmp_path):
    write_folder(tmp_path / "set")
    root = tmp_path / "set"
    (root / "train").rename(tmp_path / "other")
    (root / "val").rename(root / "test")
    spec = opened(root, tmp_path / "cache")
    assert list(spec.splits) == ["test"]
    assert len(spec.table("test")) == len(LABELS)


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


def test_a_test_in_a_folder_of_no_class_is_left_alone_too(tmp_path):
    write_folder(tmp_path / "set")
    save(PICTURES[0], tmp_path / "set/test/unknown")
    assert list(opened(tmp_path / "set", tmp_path / "cache").splits) == ["train", "val"]
    save(PICTURES[0], tmp_path / "set/testing/dog")
    (tmp_path / "set/test/unknown/a.jpg").unlink()
    assert dict(opened(tmp_path / "set", tmp_path / "cache").splits)["test"] == "testing"


def test_a_link_to_a_split_is_no_second_one(tmp_path):
    write_folder(tmp_path / "set")
    (tmp_path / "set/valid").symlink_to("val")
    assert dict(opened(tmp_path / "set", tmp_path / "cache").splits)["val"] == "val"


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


def test_hidden_folders_are_no_data_and_those_with_an_underscore_are_told(tmp_path):
    root = tmp_path / "set"
    write_folder(root)
    for place in (".ipynb_checkpoints", "train/cat/.thumbs", "train/dog/@eaDir/a.jpg", "__MACOSX"):
        save(PICTURES[0], root / place)
    save(PICTURES[2], root / "train/_other")
    (root / "train/_notes").mkdir()
    spec = opened(root, tmp_path / "cache")
    assert spec.names == ("cat", "dog")
    assert names(spec.table("train")) == sorted(f"{name}.jpg" for name in LABELS)
    told = "1 folder of pictures left out, being no class of `names:`: _other"
    assert spec.notes == (f"{root / 'train'}: {told}",)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(
        "format: folder\npath: set\ntrain: train\nval: val\nnames: [_other, cat, dog]\n"
    )
    spec = opened(yaml, tmp_path / "cache")
    assert spec.notes == ()
    assert names(spec.table("train")) == sorted(f"{name}.jpg" for name in [*LABELS, "c"])


def test_what_runs_drew_beside_the_classes_is_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        save(PICTURES[0], tmp_path / name)
    drawn = tmp_path / "runs/classify/train"
    save(PICTURES[1], drawn / "plots")
    (drawn / "config.yaml").write_text("# visiontrain 0.1.0: `visiontrain train` this file\n")
    predicted = tmp_path / "runs/predict"
    save(PICTURES[1], predicted / "images")
    write_json(predicted / "predictions.json", {"weights": "w", "images": []})
    assert opened(tmp_path, tmp_path / ".cache").names == ("cat", "dog")
    picture = f"{PICTURES[0].name}.jpg"
    assert [item.name for item in find_inputs(".")] == [f"cat/{picture}", f"dog/{picture}"]
    (tmp_path / "dog/predictions.json").write_text("{}")  # another tool's
    assert len(find_inputs(".")) == 2
    # Asked for by name, they are pictures as all others.
    assert len(find_inputs("runs/predict")) == 1


def test_a_class_without_pictures_is_told(tmp_path):
    write_folder(tmp_path / "set")
    (tmp_path / "set/train/bird").mkdir()
    spec = opened(tmp_path / "set", tmp_path / "cache")
    told = [f"{tmp_path / 'set'}: train: no image of bird"]
    assert spec.remarks({split: spec.table(split) for split in ("train", "val")}) == told
    assert not spec.remarks({"val": spec.table("val")})


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


def test_what_is_scored_needs_no_folder_of_train(tmp_path):
    spec = described(tmp_path, "path: set\ntrain: gone\nval: val\nnames: [cat, dog]")
    assert len(spec.table("val")) == len(LABELS)
    with pytest.raises(DataError, match=r"no folder .*gone"):
        spec.table("train")


def test_what_is_held_out_hangs_on_no_place(tmp_path, monkeypatch):
    held = []
    for place in ("here", "some/where/else"):
        monkeypatch.setenv("VISIONTRAIN_DATASETS", str(tmp_path / place))
        for label in ("cat", "dog"):
            for seed in range(12):
                file = save(PICTURES[0], tmp_path / place / "pets/train" / label, seed=seed)
                file.rename(file.with_name(f"{seed}.jpg"))
        spec = described(tmp_path / f"yaml-{len(held)}", "train: pets/train\nholdout: 0.3")
        held.append(names(spec.table("val")))
    assert held[0] == held[1]


def test_folders_are_looked_for_where_other_data_sets_are(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONTRAIN_DATASETS", str(tmp_path / "all"))
    write_folder(tmp_path / "all/pets")
    spec = described(tmp_path, "train: pets/train\nval: pets/val")
    assert len(spec.table("val")) == len(LABELS)
    spec = described(tmp_path, "train: pets/train\nval: none")
    with pytest.raises(DataError, match=rf"val: nothing at .*{re.escape(str(tmp_path / 'all'))}"):
        spec.table("val")


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


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_rows_of_an_image_of_several_classes_are_one_in_any_order(order, tmp_path):
    head, *lines = (LONG + "train/a.jpg,dog\n").splitlines()
    text = "\n".join([head, *(lines[k] for k in order), lines[4]])
    table = rewritten(tmp_path, text, "several: true\n").table("train")
    found = {
        Path(table.images.name(row)).name: table.classes[table.rows(row)].tolist()
        for row in range(len(table))
    }
    assert {name: sorted(labels) for name, labels in found.items()} == {
        "a.jpg": [0, 1],
        "b.jpg": [1],
    }
    assert len(table) == 2
    assert not table.defects


WIDE = ",image,cat,dog,valid,fold\n0,train/a.jpg,1,0,1,3\n1,train/b.jpg,0,1,0,2\n"


def test_columns_that_are_no_class_of_names_are_left_out_and_told(tmp_path):
    spec = rewritten(tmp_path, WIDE, "names: [cat, dog]\n")
    assert spec.table("train").classes.tolist() == [0, 1]
    assert f"{tmp_path / 'set/train.csv'}: columns left out: valid, fold" in spec.notes
    with pytest.raises(DataError, match=r"train.csv:2: fold: got '3'; give 0 or 1, .*names:"):
        rewritten(tmp_path, WIDE)


def test_a_name_without_a_column_is_no_class_that_nobody_has(tmp_path):
    spec = rewritten(tmp_path, WIDE, "names: [cat, dog]\n")
    (tmp_path / "set/val.csv").write_text("image,cat,Dog\nval/a.jpg,1,0\n")
    with pytest.raises(
        DataError, match=r"val.csv:1: no column 'dog', which `names:` lists; .* Dog"
    ):
        spec.table("val")
    with pytest.raises(DataError, match=r"train.csv:1: no column 'dogs'"):
        rewritten(tmp_path / "b", WIDE, "names: [cat, dogs]\n")


def test_a_column_of_classes_under_another_name_is_told_what_to_be_called(tmp_path):
    with pytest.raises(DataError, match=r"breed: got 'boxer'; give 0 or 1, call the column of cla"):
        rewritten(tmp_path, "image,breed\ntrain/a.jpg,boxer\n")


def test_columns_beside_the_label_are_told(tmp_path):
    spec = rewritten(tmp_path, "image,label,split\ntrain/a.jpg,cat,x\ntrain/b.jpg,dog,y\n")
    assert spec.notes == (f"{tmp_path / 'set/train.csv'}: columns left out: split",)


@pytest.mark.parametrize("several", ["cat,dog", "dog; cat"])
def test_labels_that_are_parted_by_something_else_are_told(several, tmp_path):
    rows = f'image,label\ntrain/a.jpg,cat\ntrain/b.jpg,dog\ntrain/c.jpg,"{several}"\n'
    (note,) = rewritten(tmp_path, rows).notes
    assert f"a class {several!r} beside {several[:3]!r}; write several labels as cat|dog" in note


def test_a_csv_of_another_encoding_is_named_in_any_split(tmp_path):
    source = write_csv(tmp_path / "set")
    file = tmp_path / "set/val.csv"
    file.write_bytes(file.read_bytes() + "caf\u00e9.jpg,cat\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"val\.csv: cannot be read .*; give a CSV file in UTF-8"):
        opened(source, tmp_path / "cache")


def test_a_column_of_which_no_image_of_train_has_a_1_is_a_class_all_the_same(tmp_path):
    text = "image,cat,dog,rare,notes\ntrain/a.jpg,1,0,0,\ntrain/b.jpg,0,1,0,\n"
    spec = rewritten(tmp_path, text)
    assert spec.names == ("cat", "dog", "rare")
    (tmp_path / "set/val.csv").write_text("image,cat,dog,rare\nval/a.jpg,0,0,1\n")
    assert spec.table("val").classes.tolist() == [2]


def test_an_image_that_two_files_name_from_two_folders_is_one(tmp_path):
    first, second = tmp_path / "set/first", tmp_path / "set/second"
    source = write_csv(tmp_path / "set")
    for folder, label in ((first, "cat"), (second, "dog")):
        folder.mkdir()
        text = f"image,label\ntrain/a.jpg,{label}\n"
        (folder / "train.csv").write_text(text + ("train/b.jpg,dog\n" if folder == first else ""))
    text = Path(source).read_text().replace("train.csv", "[first/train.csv, second/train.csv]")
    Path(source).write_text(text)
    table = opened(source, tmp_path / "cache").table("train")
    assert [(d.kind, d.file, d.line) for d in table.defects] == [
        ("repeated-row", str(second / "train.csv"), 2)
    ]
    Path(source).write_text(text + "several: true\n")
    table = opened(source, tmp_path / "cache").table("train")
    assert table.classes[table.rows(0)].tolist() == [0, 1]
    assert len(table) == 2
