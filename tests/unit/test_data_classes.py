"""Data sets of classified images: what is read of odd layouts, and what is said of wrong ones."""

import errno
import json
import os
from pathlib import Path

import pytest
from layouts import (
    LABELS,
    NAMES,
    PICTURES,
    opened,
    save,
    write_coco,
    write_csv,
    write_folder,
    write_yolo,
)

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.check import check
from visiontrain.data.config import DataConfig
from visiontrain.data.open import open_dataset


def files(table):
    return {table.images.name(row) for row in range(len(table))}


def classes(root, count=20):
    """Write `count` pictures of two classes each, without splits."""
    for label in NAMES:
        for seed in range(count):
            picture = save(PICTURES[0], root / label, seed=seed)
            picture.rename(picture.with_name(f"{seed}.jpg"))
    return root


def test_without_val_some_of_each_class_are_held_out_and_more_files_change_few(tmp_path):
    spec = opened(classes(tmp_path / "set"), tmp_path / "cache")
    train, val = spec.table("train"), spec.table("val")
    assert spec.notes == (
        f"{tmp_path / 'set'}: no val, so 10% of each class of train is held out for it",
    )
    assert not files(train) & files(val)
    assert len(files(train) | files(val)) == 40
    assert val.classes.tolist() == [0, 0, 1, 1]
    more = opened(classes(tmp_path / "set", 21), tmp_path / "cache").table("val")
    assert len(files(more) & files(val)) >= 2


def test_a_plain_folder_is_told_what_a_split_looks_like(tmp_path):
    spec = opened(classes(tmp_path / "set"), tmp_path / "cache")
    assert spec.how_to_add("test") == (
        "move its classes into train/, and add a folder test/CLASS to it"
    )


@pytest.mark.parametrize(("share", "held"), [(0.3, 6), (0.01, 1)])
def test_another_share_is_held_out_where_the_yaml_says_so(share, held, tmp_path):
    classes(tmp_path / "set")
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"format: folder\npath: set\nholdout: {share}\n")
    spec = opened(yaml, tmp_path / "cache")
    train, val = spec.table("train"), spec.table("val")
    assert val.classes.tolist() == [0] * held + [1] * held
    assert not files(train) & files(val)
    assert len(files(train) | files(val)) == 40
    assert f"no val, so {share:.0%} of each class" in spec.notes[0]


@pytest.mark.parametrize("share", [0, 1, "much"])
def test_a_share_that_is_none_is_refused(share, tmp_path):
    classes(tmp_path / "set", 1)
    (tmp_path / "data.yaml").write_text(f"format: folder\npath: set\nholdout: {share}\n")
    with pytest.raises(ConfigError, match=r"holdout: got .*; give a share such as 0\.1"):
        opened(tmp_path / "data.yaml", tmp_path / "cache")


def test_folders_of_pictures_that_are_no_class_are_told(tmp_path):
    write_folder(tmp_path / "set")
    save(PICTURES[0], tmp_path / "set/val/cow")
    (tmp_path / "set/train/notes").mkdir()
    yaml = tmp_path / "data.yaml"
    yaml.write_text("format: folder\npath: set\ntrain: train\nval: val\nnames: [cat, dog]\n")
    told = "val: 1 folder of pictures left out, being no class of `names:`: cow"
    assert opened(yaml, tmp_path / "cache").notes == (f"{tmp_path}/set/{told}",)


def test_splits_may_have_their_usual_other_names(tmp_path):
    root = tmp_path / "set"
    write_folder(root)
    (root / "train").rename(root / "Training")
    (root / "val").rename(root / "valid")
    spec = opened(root, tmp_path / "cache")
    assert dict(spec.splits) == {"train": "Training", "val": "valid"}
    assert len(spec.table("val")) == len(LABELS)


def test_a_class_that_train_has_not_is_named(tmp_path):
    write_folder(tmp_path / "set")
    save(PICTURES[0], tmp_path / "set/val/cow")
    with pytest.raises(DataError, match=r"set/val: a folder 'cow', which train has not; name"):
        opened(tmp_path / "set", tmp_path / "cache").table("val")


def test_one_folder_of_pictures_is_no_data_set(tmp_path):
    save(PICTURES[0], tmp_path / "set/images")
    with pytest.raises(DataError, match="holds no data set"):
        opened(tmp_path / "set", tmp_path / "cache")


def test_boxes_are_no_classes_and_the_other_way_round(tmp_path):
    source = write_folder(tmp_path / "set")
    with pytest.raises(
        ConfigError, match=r"^task: detect, but .* \(folder\) holds labels of whole"
    ):
        open_dataset(DataConfig(source=source), "detect")
    boxes = write_yolo(tmp_path / "boxes")
    with pytest.raises(ConfigError, match=r"^task: classify, but .* \(yolo\) holds boxes; take"):
        open_dataset(DataConfig(source=boxes), "classify")


def rewritten(tmp_path, text):
    """Return the data set whose train.csv holds `text`."""
    source = write_csv(tmp_path / "set")
    (tmp_path / "set/train.csv").write_text(text)
    return opened(source, tmp_path / "cache")


def test_several_labels_of_an_image_or_a_column_for_each(tmp_path):
    listed = "file,labels\ntrain/a.jpg,cat|dog\ntrain/b.jpg,\ntrain/c.jpg,dog\n"
    marked = "cat,image,dog\n1,train/a.jpg,1\n0,train/b.jpg,0\n0,train/c.jpg,1\n"
    for text in (listed, marked):
        table = rewritten(tmp_path, text).table("train")
        assert table.several
        assert table.names == NAMES
        assert table.offsets.tolist() == [0, 2, 2, 3]
        assert table.classes.tolist() == [0, 1, 1]


def test_a_blank_label_among_single_ones_is_a_slip_unless_it_is_said_not_to_be(tmp_path):
    text = "image,label\ntrain/a.jpg,cat\ntrain/b.jpg,\ntrain/c.jpg,dog\n"
    table = rewritten(tmp_path, text).table("train")
    assert (table.several, table.classes.tolist()) == (False, [0, 1])
    (defect,) = table.defects
    assert (defect.file, defect.line) == (str(tmp_path / "set/train.csv"), 3)
    assert (defect.kind, defect.reason[:9]) == ("malformed-row", "no label;")
    with (tmp_path / "set/data.yaml").open("a") as file:
        file.write("several: true\n")
    table = opened(tmp_path / "set", tmp_path / "cache").table("train")
    assert (table.several, table.offsets.tolist()) == (True, [0, 1, 1, 2])
    assert not table.defects


def test_columns_with_one_1_in_each_row_are_one_class_an_image(tmp_path):
    marked = "image,cat,dog\ntrain/a.jpg,1,0\ntrain/b.jpg,0,1\n"
    assert not rewritten(tmp_path, marked).table("train").several
    assert rewritten(tmp_path / "two", marked.replace("0,1", "0,0")).table("train").several


def test_images_that_cannot_be_used_are_told_with_the_line_that_names_them(tmp_path):
    spec = rewritten(
        tmp_path,
        "image,label\n\ntrain/a.jpg,cat\nnone.jpg,dog\ntrain/b.jpg,dog\ntrain/a.jpg,cat\n",
    )
    (tmp_path / "set/train/a.jpg").write_bytes(b"no picture")
    found = [(d.file, d.line, d.kind, d.reason) for d in spec.table("train").defects]
    csv, root = str(tmp_path / "set/train.csv"), tmp_path / "set"
    assert [item[:3] for item in found] == [
        (csv, 3, "unknown-format"),
        (csv, 4, "missing-image"),
        (csv, 6, "unknown-format"),
    ]
    assert found[1][3] == f"{root}/none.jpg: no such file"
    assert found[2][3].startswith(f"{root}/train/a.jpg: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('image,label\ntrain/a.jpg,cat\n"train/b.jpg,dog\ntrain/c.jpg,dog\n', 3),
        ('image,label\n"train/a.jpg,cat\ntrain/b.jpg,"dog"\n', 2),
        ('image,label\n"train/\na.jpg",cat\ntrain/b.jpg,"dog\n', 4),
        ('image,"label\ntrain/a.jpg,cat\n', 1),
    ],
)
def test_a_quote_that_is_not_closed_is_named_by_the_line_where_its_row_begins(text, line, tmp_path):
    with pytest.raises(
        DataError, match=rf"train\.csv:{line}: no row of a CSV .*; close its quotes"
    ):
        rewritten(tmp_path, text)


def listed(layout, root, name):
    """Return a data set that names one image more."""
    if layout == "csv":
        source, file = write_csv(root), root / "train.csv"
        file.write_text(f"{file.read_text()}{name},cat\n")
    elif layout == "yolo":
        source, file = write_yolo(root), root / "train.txt"
        file.write_text(f"images/train/a.jpg\n{name}\n")
        yaml = Path(source)
        yaml.write_text(yaml.read_text().replace("images/train", "train.txt"))
    else:
        source = write_coco(root)
        content = json.loads(Path(source).read_text())
        content["images"].append({"id": 1, "file_name": name})
        Path(source).write_text(json.dumps(content))
    return source


@pytest.mark.parametrize("layout", ["csv", "yolo", "coco"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("x" * 256 + ".jpg", "corrupt-image"), ("x\0.jpg", "missing-image")],
    ids=["long", "NUL"],
)
def test_a_name_that_no_file_can_have_costs_its_own_image_only(layout, name, kind, tmp_path):
    source = listed(layout, tmp_path / "set", name)
    table = opened(source, tmp_path / "cache").table("train")
    assert [defect.kind for defect in table.defects] == [kind]
    assert len(table) == (1 if layout == "yolo" else len(PICTURES))


def test_a_folder_that_cannot_be_entered_costs_its_own_images_only(tmp_path, monkeypatch):
    """As the system says it to a user who may not: Path's exists raises, and open does."""
    shut, whole, opening = str(tmp_path / "set/shut"), os.stat, Path.open

    def refused(function):
        def call(path, *arguments, **keys):
            if str(path).startswith(shut):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments, **keys)

        return call

    monkeypatch.setattr(os, "stat", refused(whole))
    monkeypatch.setattr(Path, "open", refused(opening))
    table = opened(listed("csv", tmp_path / "set", "shut/x.jpg"), tmp_path / "cache").table("train")
    (defect,) = table.defects
    assert (defect.kind, defect.line) == ("corrupt-image", 6)
    assert "cannot be read" in defect.reason


def test_wrong_rows_are_named_by_line(tmp_path):
    good = "image,label\ntrain/a.jpg,cat\ntrain/b.jpg,dog\n"
    with pytest.raises(DataError, match=r"train.csv:3: 3 columns, but the first line has 2; quote"):
        rewritten(tmp_path, good.replace("dog", "dog,1"))
    with pytest.raises(DataError, match=r"train.csv:1: columns x, y; name one image"):
        rewritten(tmp_path, good.replace("image,label", "x,y"))
    with pytest.raises(DataError, match=r"train.csv:2: cat: got '2'; give 0 or 1"):
        rewritten(tmp_path, "image,cat\ntrain/a.jpg,2\n")
    spec = rewritten(tmp_path, good + "train/missing.jpg,cat\n")
    table = spec.table("train")
    assert len(table) == 2
    assert [defect.kind for defect in table.defects] == ["missing-image"]


def test_a_label_that_is_no_class_stops_a_run(tmp_path):
    source = write_csv(tmp_path / "set")
    (tmp_path / "set/val.csv").write_text("image,label\nval/a.jpg,cow\nval/b.jpg,cat\n")
    spec = opened(source, tmp_path / "cache")
    with pytest.raises(DataError, match=r"val.csv:2: class 'cow' is none of cat, dog"):
        spec.table("val")


def test_the_check_speaks_of_labels(tmp_path):
    spec = opened(write_folder(tmp_path / "set"), tmp_path / "cache")
    lines = check(spec, ["train", "val"]).lines()
    assert "train: 4 images, 4 labels, 0 images without a label, 0 turned by EXIF" in lines
