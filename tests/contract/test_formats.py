"""Every format of the registry gives the same kind of table."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import LABELS, NAMES, PICTURES, WRITERS, opened, pixels

from visiontrain.data.registry import FORMATS

BOXED = ("coco", "shards", "voc", "yolo")
FILELESS = ("digits", "disk")  # scenes are composed: there are no files to spare


def written(kind, tmp_path, **settings):
    return opened(WRITERS[kind](tmp_path / "set"), tmp_path / "cache", **settings)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_is_flat_and_its_boxes_are_inside(kind, tmp_path):
    table = written(kind, tmp_path).table("train")
    assert len(table) == len(table.images) == len(table.offsets) - 1
    assert table.offsets[0] == 0
    assert table.offsets[-1] == len(table.boxes) == len(table.classes) == len(table.area)
    assert (np.diff(table.offsets) >= 0).all()
    kinds = [table.sizes, table.offsets, table.boxes, table.classes, table.crowd, table.area]
    expected = [np.int32, np.int64, np.float32, np.int32, np.bool_, np.float32]
    assert [array.dtype for array in kinds] == expected
    sizes = np.repeat(table.sizes, np.diff(table.offsets), axis=0)
    assert (table.boxes >= 0).all()
    assert (table.boxes <= np.tile(sizes, 2)).all()
    assert (table.boxes[:, 2:] > table.boxes[:, :2]).all()
    assert set(table.classes.tolist()) <= set(range(len(table.names)))
    for row in range(len(table)):
        image = table.images.read(row)
        assert image.shape == (*table.sizes[row, ::-1], 3)
        assert image.dtype == np.uint8


@pytest.mark.parametrize("kind", ["csv", "folder"])
def test_every_layout_of_the_same_classes_gives_the_same_table(kind, tmp_path):
    spec = written(kind, tmp_path)
    table = spec.table("train")
    assert spec.task == table.task == "classify"
    assert table.names == NAMES
    found = {Path(table.images.name(k)).stem: NAMES[c] for k, c in enumerate(table.classes)}
    assert found == LABELS
    assert np.array_equal(table.boxes, np.pad(table.sizes, ((0, 0), (2, 0))))
    assert not table.defects


@pytest.mark.parametrize("kind", BOXED)
def test_every_layout_of_the_same_data_gives_the_same_table(kind, tmp_path):
    table = written(kind, tmp_path).table("train")
    boxes = [box for picture in PICTURES for box in picture.boxes]
    assert table.names == NAMES
    assert table.sizes.tolist() == [list(picture.size) for picture in PICTURES]
    assert np.diff(table.offsets).tolist() == [len(picture.boxes) for picture in PICTURES]
    assert table.classes.tolist() == [box[0] for box in boxes]
    np.testing.assert_allclose(table.boxes, [box[1:] for box in boxes], atol=1e-4)
    areas = [(x2 - x1) * (y2 - y1) for _, x1, y1, x2, y2 in boxes]
    np.testing.assert_allclose(table.area, areas, rtol=1e-4)
    assert not table.defects
    error = np.abs(table.images.read(0)[..., ::-1].astype(int) - pixels(PICTURES[0]))
    assert error.mean() < 8  # JPEG, and red is red


@pytest.mark.parametrize("kind", FORMATS)
def test_a_table_reads_the_same_in_another_process(kind, tmp_path):
    table = written(kind, tmp_path).table("train")
    again = pickle.loads(pickle.dumps(table))
    assert all(np.array_equal(table.images.read(i), again.images.read(i)) for i in range(3))
    assert again.images.name(1) == table.images.name(1)


@pytest.mark.parametrize("kind", FORMATS)
def test_less_data_is_a_subset(kind, tmp_path):
    whole = written(kind, tmp_path).table("train")
    names = [whole.images.name(row) for row in range(len(whole))]
    for settings in ({"train_images": 3}, {"fraction": 0.75}):
        part = written(kind, tmp_path, **settings).table("train")
        assert len(part) == settings.get("train_images", round(0.75 * len(whole)))
        rows = [names.index(part.images.name(row)) for row in range(len(part))]
        assert rows == sorted(rows)
        for row, place in enumerate(rows):
            assert np.array_equal(part.boxes[part.rows(row)], whole.boxes[whole.rows(place)])
    assert len(written(kind, tmp_path, val_images=2).table("val")) == 2
    assert len(written(kind, tmp_path, train_images=2).table("val")) == 4


@pytest.mark.parametrize("kind", FORMATS)
def test_single_cls_makes_all_classes_one(kind, tmp_path):
    spec = written(kind, tmp_path, single_cls=True)
    table = spec.table("train")
    assert table.names == spec.names == ("object",)
    assert not table.classes.any()
    assert len(table.boxes) == len(written(kind, tmp_path).table("train").boxes)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [(kind, cache) for kind in FORMATS for cache in ("ram", "disk") if (kind, cache) != FILELESS],
)
def test_cached_images_are_the_same(kind, cache, tmp_path):
    plain = written(kind, tmp_path).table("val").images
    cached = written(kind, tmp_path, cache=cache).table("val").images
    assert [cached.name(i) for i in range(4)] == [plain.name(i) for i in range(4)]
    assert all(np.array_equal(cached.read(i), plain.read(i)) for i in range(4))


@pytest.mark.parametrize("kind", FORMATS)
def test_reading_writes_nothing_beside_the_data(kind, tmp_path):
    source = WRITERS[kind](tmp_path / "set")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "set").rglob("*")}
    cache = "ram" if kind == FILELESS[0] else "disk"
    opened(source, tmp_path / "cache", cache=cache).table("train")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "set").rglob("*")}
