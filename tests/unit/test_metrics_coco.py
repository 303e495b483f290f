"""COCO's numbers, against pycocotools."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visiontrain.core.errors import DivergedError
from visiontrain.data.table import Table
from visiontrain.metrics.curves import curves
from visiontrain.metrics.detection import DetectionEvaluator, coco_tables
from visiontrain.metrics.rows import canonical

STATS = (
    *("map", "map50", "map75", "map_small", "map_medium", "map_large"),
    *("ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large"),
)

ONE = pytest.approx(1, abs=1e-12)  # pycocotools' guard against 0 / 0 costs the last bit


class NoPixels:
    """An image source that is never asked for pixels."""

    def __len__(self):
        raise NotImplementedError

    def read(self, row):
        raise NotImplementedError

    def name(self, row):
        raise NotImplementedError


def make_table(per_image, names, size=200):
    """Make a table from rows (class, x1, y1, x2, y2, crowd, difficult, area) per image."""
    rows = np.array([row for rows in per_image for row in rows], np.float64).reshape(-1, 8)
    counts = [len(rows) for rows in per_image]
    return Table(
        names=tuple(names),
        images=NoPixels(),
        sizes=np.full((len(per_image), 2), size, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=rows[:, 1:5].astype(np.float32),
        classes=rows[:, 0].astype(np.int32),
        crowd=rows[:, 5] > 0,
        difficult=rows[:, 6] > 0,
        area=rows[:, 7].astype(np.float32),
    )


def random_case(seed):
    """Make boxes and detections with crowds, difficult ones, ties, touching and empty images.

    Corners lie on a coarse grid, so that equal overlaps, and overlaps of exactly a threshold,
    are common; scores take few values; areas are not those of the boxes.
    """
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    step = int(rng.choice([1, 10, 20]))
    truth, found = [], []
    for image in range(images):
        count = int(rng.integers(0, 7)) * int(rng.random() < 0.8)
        corner = rng.integers(0, 10, (count, 2)) * 10
        side = (rng.integers(1, 120 // step, (count, 2))) * step
        label = rng.integers(0, classes, count) if seed % 3 else np.zeros(count)
        flags = rng.random((count, 2)) < 0.15
        area = side.prod(axis=1) * rng.choice([1.0, 0.3], count)
        truth.append(np.column_stack([label, corner, corner + side, flags, area]))
        if rng.random() < 0.2:
            continue  # an image without detections
        for _ in range(int(rng.integers(0, 4))):
            boxes = np.hstack([corner, corner + side]) + rng.integers(-1, 2, (count, 4)) * step
            boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            score = rng.integers(1, 6, count) / 5
            other = rng.integers(0, classes, count)
            chosen = np.where(rng.random(count) < 0.8, label, other)
            found.append(np.column_stack([np.full(count, image), boxes, score, chosen]))
        spare = rng.integers(0, 100, (3, 2))
        found.append(np.column_stack([np.full(3, image), spare, spare + 9, rng.random(3), [0] * 3]))
    rows = np.vstack([np.empty((0, 7)), *found])
    return make_table(truth, [f"class {n}" for n in range(classes)]), rows


def oracle(table, rows):
    """Return pycocotools' tables and 12 numbers."""
    images = np.repeat(np.arange(len(table)), np.diff(table.offsets)).tolist()
    boxes = table.boxes.astype(np.float64)
    known = COCO()
    known.dataset = {
        "info": {},
        "images": [{"id": n, "width": 200, "height": 200} for n in range(len(table))],
        "categories": [{"id": n, "name": name} for n, name in enumerate(table.names)],
        "annotations": [
            {
                "id": n + 1,
                "image_id": image,
                "category_id": int(table.classes[n]),
                "bbox": [*boxes[n, :2].tolist(), *(boxes[n, 2:] - boxes[n, :2]).tolist()],
                "area": float(table.area[n]),
                "iscrowd": int(table.crowd[n] or table.difficult[n]),
            }
            for n, image in enumerate(images)
        ],
    }
    sides = rows[:, 3:5] - rows[:, 1:3]
    results = np.column_stack([rows[:, :3], sides, rows[:, 5:]])
    with contextlib.redirect_stdout(io.StringIO()):
        known.createIndex()
        scoring = COCOeval(known, known.loadRes(results), "bbox")
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return scoring.eval["precision"], scoring.eval["recall"], scoring.stats


def test_a_thousand_random_cases_equal_pycocotools():
    decided = 0
    for seed in range(1000):
        table, rows = random_case(seed)
        array = canonical(rows, len(table), len(table.names))
        if not len(array):
            continue  # pycocotools can't load an empty list of results
        precision, recall, stats = oracle(table, array)
        ours = coco_tables(table, array)
        np.testing.assert_allclose(ours[0], precision, rtol=0, atol=1e-12, err_msg=str(seed))
        np.testing.assert_allclose(ours[1], recall, rtol=0, atol=1e-12, err_msg=str(seed))
        # our own matching, on which the curves rest, agrees with the library's
        ap = np.where(precision[0, 0, :, 0, 2] < 0, np.nan, precision[0, :, :, 0, 2].mean(axis=0))
        np.testing.assert_allclose(curves(table, array).ap, ap, atol=1e-12, err_msg=str(seed))
        if seed % 5 == 0:
            scores = DetectionEvaluator(table).compute(rows)
            numbers = [scores[name] for name in STATS]
            known = np.where(stats < 0, np.nan, stats)
            np.testing.assert_allclose(numbers, known, rtol=0, atol=1e-12, err_msg=str(seed))
        decided += bool((precision > 0).any() and (ap < 1).any())
    assert decided > 500  # most cases tell right from wrong


def box(label, *corners, crowd=0, difficult=0):
    x1, y1, x2, y2 = corners
    return (label, *corners, crowd, difficult, (x2 - x1) * (y2 - y1))


def score(table, *rows):
    return DetectionEvaluator(table).compute(np.array(rows, np.float64).reshape(-1, 7))


def test_a_crowd_and_a_difficult_box_are_neither_missed_nor_punished():
    for flag in ("crowd", "difficult"):
        known = [box(0, 0, 0, 40, 40), box(0, 100, 100, 160, 160, **{flag: 1})]
        table = make_table([known], ["cat"])
        right = (0, 0, 0, 40, 40, 0.5, 0)
        ignored = (0, 100, 100, 160, 160, 0.9, 0)  # twice, and above the right one
        again = (0, 101, 101, 160, 160, 0.8, 0)
        found = score(table, right, ignored, again)
        assert (found["map"], found["recall"], found["precision"]) == (ONE, 1, 1)
        assert found["per_class"]["cat"]["boxes"] == 1
        elsewhere = (0, 160, 0, 190, 40, 0.9, 0)
        assert score(table, right, elsewhere)["map"] == pytest.approx(0.5)


def test_the_area_of_the_table_decides_the_size_range():
    table = make_table([[(0, 0, 0, 100, 100, 0, 0, 500.0)]], ["cat"])  # a thin diagonal shape
    found = score(table, (0, 0, 0, 100, 100, 0.5, 0))
    assert found["map_small"] == ONE
    assert np.isnan(found["map_large"])


def test_what_nothing_decides_is_nan_and_the_rest_a_number():
    table = make_table([[box(0, 0, 0, 40, 40)], []], ["cat", "dog"])
    found = score(table, (0, 0, 0, 40, 40, 0.5, 0), (1, 0, 0, 9, 9, 0.9, 1))
    assert found["map"] == ONE  # a class without boxes does not count, as in COCO
    assert np.isnan(found["per_class"]["dog"]["map"])
    assert np.isnan(found["per_class"]["dog"]["precision"])
    silent = score(table)
    assert silent["map"] == silent["recall"] == silent["precision"] == silent["f1"] == 0
    empty = score(make_table([[], []], ["cat"]), (0, 0, 0, 9, 9, 0.5, 0))
    assert all(np.isnan(empty[name]) for name in (*STATS, "precision", "recall", "f1", "conf"))
    assert empty["per_class"]["cat"]["boxes"] == 0


def test_detections_that_are_not_finite_or_not_of_the_table_are_refused():
    table = make_table([[box(0, 0, 0, 40, 40)]], ["cat"])
    good = (0, 0, 0, 40, 40, 0.5, 0)
    with pytest.raises(DivergedError, match="1 of 2 detections are not finite"):
        score(table, good, (0, 0, 0, np.nan, 40, 0.5, 0))
    with pytest.raises(ValueError, match="image 1 is not in the table"):
        score(table, (1, *good[1:]))
    with pytest.raises(ValueError, match="class 3 is not in the table"):
        score(table, (*good[:6], 3))


def test_a_perfect_detector_scores_one_and_the_best_confidence_is_amid_the_plateau():
    table, _ = random_case(7)
    table = replace(table, crowd=table.crowd & False, difficult=table.difficult & False)
    images = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    rows = np.column_stack([images, table.boxes, np.full(len(images), 0.8), table.classes])
    found = score(table, *rows)
    assert len(rows) > 3
    for name in ("map", "map50", "map75", "ar_100", "precision", "recall", "f1"):
        assert found[name] == ONE
    assert found["conf"] == pytest.approx(0.4)  # from 0 to 0.8 all is as good
