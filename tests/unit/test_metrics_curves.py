"""Curves against a slow loop; the confusion matrix by hand."""

from __future__ import annotations

import numpy as np
from test_metrics_coco import box, make_table, random_case

from visiontrain.metrics import matching
from visiontrain.metrics.curves import CONFIDENCES, confusion_matrix, curves
from visiontrain.metrics.matching import Truth, match, pairs
from visiontrain.metrics.rows import canonical


def slow_overlap(a, b, *, crowd):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(width, 0) * max(height, 0)
    own, other = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    return inside / (own if crowd else own + other - inside)


def slow_counts(table, rows, label, confidence):
    """Count detections that are right or wrong, and those that are right, one by one."""
    counted = correct = 0
    for image in range(len(table)):
        span = range(*table.rows(image).indices(len(table.boxes)))
        known = [n for n in span if table.classes[n] == label]
        ignored = {n for n in known if table.crowd[n] or table.difficult[n]}
        free = set(known)
        mine = [row for row in rows if row[0] == image and row[6] == label and row[5] >= confidence]
        for row in mine:
            best, reached = None, 0.5
            for n in [*(n for n in known if n not in ignored), *(n for n in known if n in ignored)]:
                if n not in free or (best is not None and best not in ignored and n in ignored):
                    continue
                overlap = slow_overlap(row[1:5], table.boxes[n].tolist(), crowd=n in ignored)
                if overlap >= reached:
                    best, reached = n, overlap
            if best in ignored:
                continue
            counted += 1
            if best is not None:
                correct += 1
                free.discard(best)
    return counted, correct


def test_curves_equal_a_slow_loop():
    checked = 0
    for seed in range(60):
        table, rows = random_case(seed)
        rows = canonical(rows, len(table), len(table.names))
        found = curves(table, rows)
        for label in range(len(table.names)):
            for step in (0, 200, 201, 600, 1000):
                counts = slow_counts(table, rows, label, CONFIDENCES[step])
                assert (found.predicted[label, step], found.correct[label, step]) == counts
                checked += counts[1] > 0
    assert checked > 100


def test_curves_are_the_shares_they_say():
    table = make_table([[box(0, 0, 0, 40, 40), box(0, 60, 60, 90, 90)]], ["cat", "dog"])
    rows = np.array([(0, 0, 0, 40, 40, 0.9, 0), (0, 100, 0, 140, 40, 0.5, 0)])
    found = curves(table, rows)
    at = np.searchsorted(CONFIDENCES, [0.2, 0.7, 0.95])
    assert found.precision[0, at].tolist() == [0.5, 1, 0]
    assert found.recall[0, at].tolist() == [0.5, 0.5, 0]
    np.testing.assert_allclose(found.f1[0, at], [0.5, 2 / 3, 0])
    assert np.isnan(found.f1[1]).all()
    assert 0.5 < CONFIDENCES[found.best] <= 0.9


def test_pairs_do_not_depend_on_how_they_are_cut(monkeypatch):
    table, rows = random_case(5)
    rows = canonical(rows, len(table), len(table.names))
    truth = Truth.of(table)
    images = rows[:, 0].astype(np.int64)
    whole = pairs(rows, images, truth, truth.images, 0.1)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 3)
    cut = pairs(rows, images, truth, truth.images, 0.1)
    assert len(whole.box) > 10
    for name in ("detection", "box", "overlap"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(cut, name))


def test_only_the_best_hundred_of_an_image_and_class_count():
    table = make_table([[box(0, 0, 0, 40, 40)]], ["cat"])
    wrong = [(0, 100, 100, 140, 140, 0.9, 0)] * 100
    rows = canonical(np.array([*wrong, (0, 0, 0, 40, 40, 0.5, 0)]), 1, 1)
    truth = Truth.of(table)
    assert not match(rows, truth, 0.5).correct(truth).any()
    assert match(rows, truth, 0.5, limit=101).correct(truth).sum() == 1


def test_confusion_by_hand():
    cat, dog, nothing = range(3)
    table = make_table(
        [
            [box(cat, 0, 0, 40, 40), box(dog, 100, 100, 140, 140), box(dog, 0, 150, 40, 190)],
            [box(cat, 0, 0, 90, 90, crowd=1), box(cat, 100, 0, 140, 40, difficult=1)],
        ],
        ["cat", "dog"],
    )
    rows = [
        (0, 0, 0, 40, 40, 0.9, cat),  # right
        (0, 2, 0, 40, 40, 0.95, cat),  # the same again, overlapping less
        (0, 100, 100, 140, 141, 0.6, cat),  # a dog, called cat
        (0, 150, 0, 190, 40, 0.7, dog),  # nothing is there; and one dog is missed
        (0, 0, 150, 40, 190, 0.25, dog),  # not above the confidence
        (1, 10, 10, 30, 30, 0.9, cat),  # in the crowd
        (1, 100, 0, 140, 40, 0.9, cat),  # the difficult one
        (1, 10, 50, 30, 80, 0.9, dog),  # a dog in a crowd of cats
    ]
    matrix = confusion_matrix(table, np.array(rows))
    expected = np.zeros((3, 3), np.int64)
    expected[cat, cat] = 1
    expected[cat, nothing] = 1
    expected[cat, dog] = 1
    expected[dog, nothing] = 2
    expected[nothing, dog] = 1
    np.testing.assert_array_equal(matrix, expected)
    shuffled = np.random.default_rng(0).permutation(np.array(rows))
    np.testing.assert_array_equal(confusion_matrix(table, shuffled), expected)
