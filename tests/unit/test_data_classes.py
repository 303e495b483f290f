"""Data sets of classified images: what is read of odd layouts, and what is said of wrong ones."""

import pytest
from layouts import LABELS, NAMES, PICTURES, opened, save, write_csv, write_folder, write_yolo

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
