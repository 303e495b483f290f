"""Precision, recall and F1 by confidence, and the confusion matrix.

C classes, T confidences, R recalls.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.metrics.matching import Flags, Labels, Truth, match, pairs
from visiontrain.metrics.rows import CLASS, IMAGE_COLUMN, SCORE, Rows, canonical

CONFIDENCES = np.arange(1001) / 1000
RECALLS = np.linspace(0, 1, 101)  # COCO's
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Curves:
    """How right and how complete detections are, by the confidence they are cut at.

    Detections scored as the confidence or higher count. Classes without a box are nan.
    """

    names: tuple[str, ...]
    boxes: NDArray[np.int64]  # (C,): to be found
    predicted: NDArray[np.int64]  # (C, T): detections left at CONFIDENCES
    correct: NDArray[np.int64]  # (C, T): of those, found a box
    precision_at_recall: Floats  # (C, R): best precision at RECALLS or more

    @property
    def precision(self) -> Floats:
        """Share of the detections that are right (C, T); 0 where none is left."""
        return self._share(self.correct, np.maximum(self.predicted, 1))

    @property
    def recall(self) -> Floats:
        """Share of the boxes that are found (C, T)."""
        return self._share(self.correct, self.boxes[:, None])

    @property
    def f1(self) -> Floats:
        """Harmonic mean of precision and recall (C, T)."""
        return self._share(2 * self.correct, self.predicted + self.boxes[:, None])

    @property
    def ap(self) -> Floats:
        """Average precision at this one overlap (C,): the mean over COCO's 101 recalls."""
        return self.precision_at_recall.mean(axis=1)

    @property
    def best(self) -> int | None:
        """Index into CONFIDENCES of the highest mean F1; None where no class has a box.

        Of several (a plateau) the middle one: farthest from where F1 falls.
        """
        if not self.boxes.any():
            return None
        mean = self.f1[self.boxes > 0].mean(axis=0)
        highest = np.flatnonzero(mean == mean.max())
        return int(highest[len(highest) // 2])

    def _share(self, part: NDArray[np.int64], whole: NDArray[np.int64]) -> Floats:
        out = np.full(part.shape, np.nan)
        return np.divide(part, whole, out=out, where=(self.boxes > 0)[:, None])


def curves(table: Labels, rows: Tensor | Rows, overlap: float = 0.5) -> Curves:
    """Score `rows` (K, 7) against `table` at every confidence.

    Matching is COCO's at one overlap, 100 detections per image and class, so that `ap` equals
    the library's AP50.
    """
    truth, array = Truth.of(table), canonical(rows, len(table), len(table.names))
    matches = match(array, truth, overlap)
    counted, correct = matches.counted(truth), matches.correct(truth)
    boxes = truth.counts(len(table.names))
    scored = [
        _class_curves(array[of, SCORE], correct[of], int(boxes[label]))
        for label in range(len(table.names))
        for of in [counted & (array[:, CLASS] == label)]
    ]
    predicted, right, precision = (np.stack(column) for column in zip(*scored, strict=True))
    return Curves(table.names, boxes, predicted, right, precision)


def _class_curves(
    scores: Floats, correct: Flags, boxes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
    """Return one class's counts at CONFIDENCES, and precision at RECALLS."""
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(correct[order])
    left = np.searchsorted(-scores, -CONFIDENCES, side="right")  # how many score >= each
    right = np.concatenate([[0], found])[left]
    if not boxes:
        return left, right, np.full(len(RECALLS), np.nan)
    # pycocotools' accumulate, at one overlap
    precision = found / (np.arange(len(found)) + 1 + np.spacing(1))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(found / boxes, RECALLS, side="left")
    return left, right, np.append(envelope, 0.0)[at]


def confusion_matrix(
    table: Labels, rows: Tensor | Rows, *, confidence: float = 0.25, overlap: float = 0.45
) -> NDArray[np.int64]:
    """Count which class was found where which class is.

    Pairs are made whatever their classes, largest overlap first, each detection and each box
    once, from detections scored above `confidence`. A detection without a pair that lies on an
    ignored box of its class is left out.

    Returns:
        (C + 1, C + 1): row = predicted class, column = true class; the last row counts boxes
        that were missed, the last column detections where nothing is.
    """
    classes = len(table.names)
    truth, array = Truth.of(table), canonical(rows, len(table), classes)
    array = array[array[:, SCORE] > confidence]
    found = pairs(array, array[:, IMAGE_COLUMN].astype(np.int64), truth, truth.images, overlap)
    predicted, true = array[:, CLASS].astype(np.int64), truth.classes
    ignored = truth.ignored[found.box]
    on_ignored = np.zeros(len(array), np.bool_)
    same = predicted[found.detection] == true[found.box]
    on_ignored[found.detection[ignored & same]] = True

    detection, box = found.detection[~ignored], found.box[~ignored]
    free_detection, free_box = np.ones(len(array), np.bool_), ~truth.ignored
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for pair in np.argsort(-found.overlap[~ignored], kind="stable"):
        if free_detection[detection[pair]] and free_box[box[pair]]:
            free_detection[detection[pair]] = free_box[box[pair]] = False
            matrix[predicted[detection[pair]], true[box[pair]]] += 1
    wrong = predicted[free_detection & ~on_ignored]
    matrix[:, classes] = np.bincount(wrong, minlength=classes + 1)
    matrix[classes] = np.bincount(true[free_box], minlength=classes + 1)
    return matrix
