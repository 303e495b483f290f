"""Scores of classifiers: right at first, among five, by class, and how sure they may be.

K images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.errors import DataError, DivergedError
from visiontrain.core.interfaces import Metrics
from visiontrain.core.types import ClassScores

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TOP = 5
BINS = 15  # of confidences (Guo et al. 2017, arXiv 1706.04599)
IMAGE, SURE, MISSED, FIRST = 0, 1, 2, 3  # columns: id, confidence, -log p of the truth, classes


class Labels(Protocol):
    """The truth, as a table has it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where the classes of each image begin, and the last one's end (N + 1,)."""
        ...

    @property
    def classes(self) -> NDArray[np.int32]:
        """Of all images, (K,)."""
        ...

    @property
    def several(self) -> bool:
        """Whether an image may have any number of classes."""
        ...

    def __len__(self) -> int: ...


def truth(table: Labels) -> Ints:
    """Return the class of every image (N,), each of which has one."""
    return table.classes[table.offsets[:-1]].astype(np.int64)


def build_evaluator(table: Labels) -> ClassificationEvaluator | LabelsEvaluator:
    """Choose by whether an image may have any number of classes."""
    return LabelsEvaluator(table) if table.several else ClassificationEvaluator(table)


def stacked(predictions: Sequence[ClassScores], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores (K, C) and ids (K,) of what is no filler, on the CPU."""
    real = [k for k, image in enumerate(ids.tolist()) if image >= 0]
    rows = [predictions[k].scores.cpu().double() for k in real]
    return torch.stack(rows) if rows else torch.empty(0, 0), ids.cpu()[real]


class ClassificationEvaluator:
    """Scores images of one class each."""

    def __init__(self, table: Labels) -> None:
        self._table, self._truth = table, truth(table)
        self._parts: list[Tensor] = []

    def update(self, predictions: Sequence[ClassScores], ids: Tensor) -> None:
        """Take the scores of the images `ids` (B,); negative ids only fill a batch."""
        scores, ids = stacked(predictions, ids)
        if not len(ids):
            return
        own = torch.from_numpy(self._truth)[ids]
        best = scores.topk(min(TOP, scores.shape[1])).indices
        missing = -scores.gather(1, own[:, None]).clamp(min=1e-12).log()
        columns = (ids[:, None], scores.max(1, keepdim=True).values, missing, best)
        self._parts.append(torch.cat([column.double() for column in columns], 1))

    def rows(self) -> Tensor:
        """Return (K, 3 + up to 5): image, confidence, -log p of the truth, likeliest classes."""
        width = FIRST + min(TOP, len(self._table.names))
        return torch.cat([torch.empty(0, width, dtype=torch.float64), *self._parts])

    def compute(self, rows: Tensor) -> Metrics:
        """Score rows of any order; each image counts once.

        Returns:
            `top1`, `top5`, `balanced` (mean recall of the classes), `loss`, `ece`, `per_class`.

        Raises:
            DataError: no image could be read.
            DivergedError: a score is not finite.
        """
        array = unique_rows(rows)
        right = array[:, FIRST:] == self._truth[array[:, IMAGE].astype(int)][:, None]
        own = self._truth[array[:, IMAGE].astype(int)]
        each = by_class(own, array[:, FIRST].astype(int), self._table.names)
        recalls = [row["recall"] for row in each.values() if row["images"]]
        return {
            "top1": float(right[:, 0].mean()),
            "top5": float(right.any(1).mean()),
            "balanced": float(np.mean(recalls)),
            "loss": float(array[:, MISSED].mean()),
            "ece": calibration_error(array[:, SURE], right[:, 0]),
            "per_class": each,
        }


def unique_rows(rows: Tensor) -> Floats:
    """Return rows as an array, in the order of the images, each once.

    Raises:
        DataError: there are none.
        DivergedError: a score is not finite.
    """
    array = rows.numpy()
    if not len(array):
        raise DataError("evaluation: no image could be read; `visiontrain check` names them")
    if not np.isfinite(array).all():
        raise DivergedError("evaluation: a score is not finite; train with a lower optim.lr")
    return array[np.unique(array[:, IMAGE], return_index=True)[1]]


def confusion(table: Labels, array: Floats) -> Ints:
    """Count images by what they are (row) and what they are taken for (column), (C, C)."""
    classes = len(table.names)
    own, said = truth(table)[array[:, IMAGE].astype(int)], array[:, FIRST].astype(int)
    return np.bincount(own * classes + said, minlength=classes**2).reshape(classes, classes)


def by_class(own: Ints, said: Ints, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return precision, recall and F1 of each class; nan where nothing decides.

    Counted by class, not by pair of classes: of 20,000, that is a matrix of gigabytes.

    Args:
        own: the classes of images (K,).
        said: what they are taken for (K,).
        names: of all classes.
    """
    wanted, taken, right = (
        np.bincount(classes, minlength=len(names)) for classes in (own, said, own[own == said])
    )
    with np.errstate(invalid="ignore"):
        recall, precision, f1 = right / wanted, right / taken, 2 * right / (wanted + taken)
    return {
        name: {
            "recall": float(recall[label]),
            "precision": float(precision[label]),
            "f1": float(f1[label]),
            "images": int(wanted[label]),
        }
        for label, name in enumerate(names)
    }


def calibration(sure: Floats, right: NDArray[np.bool_]) -> Floats:
    """Return for each of `BINS` bins of confidence: images, mean confidence, accuracy (BINS, 3)."""
    which = np.minimum((sure * BINS).astype(int), BINS - 1)
    images = np.bincount(which, minlength=BINS).astype(np.float64)
    with np.errstate(invalid="ignore"):
        means = [np.bincount(which, values, BINS) / images for values in (sure, right)]
    return np.stack([images, *means], 1)


def calibration_error(sure: Floats, right: NDArray[np.bool_]) -> float:
    """Return the expected calibration error: how far confidence is from accuracy on average."""
    images, confidence, accuracy = calibration(sure, right).T
    gap = np.nan_to_num(np.abs(confidence - accuracy))
    return float((gap * images).sum() / images.sum())


class LabelsEvaluator:
    """Scores images of any number of classes."""

    def __init__(self, table: Labels) -> None:
        self._table = table
        self._parts: list[Tensor] = []

    def update(self, predictions: Sequence[ClassScores], ids: Tensor) -> None:
        """Take the scores of the images `ids` (B,); negative ids only fill a batch."""
        scores, ids = stacked(predictions, ids)
        if len(ids):
            self._parts.append(torch.cat([ids.double()[:, None], scores], 1))

    def rows(self) -> Tensor:
        """Return (K, 1 + C): image, score of each class."""
        width = 1 + len(self._table.names)
        return torch.cat([torch.empty(0, width, dtype=torch.float64), *self._parts])

    def compute(self, rows: Tensor) -> Metrics:
        """Score rows of any order; each image counts once.

        Returns:
            `map` (mean average precision over the classes that an image has), `loss`, and of all
            decisions at a score of a half `precision`, `recall`, `f1`; `per_class`.

        Raises:
            DataError: no image could be read.
            DivergedError: a score is not finite.
        """
        array = unique_rows(rows)
        scores, wanted = array[:, 1:], wanted_of(self._table)[array[:, IMAGE].astype(int)]
        said = scores >= 0.5
        each = {
            name: {
                "map": average_precision(scores[:, k], wanted[:, k]),
                **_decided(said[:, k], wanted[:, k]),
                "images": int(wanted[:, k].sum()),
            }
            for k, name in enumerate(self._table.names)
        }
        # A class at a time: of many images and classes each copy of the scores is gigabytes.
        loss = sum(_surprise(scores[:, k], wanted[:, k]) for k in range(scores.shape[1]))
        known = [row["map"] for row in each.values() if row["images"]]
        return {
            "map": float(np.mean(known)) if known else float("nan"),
            **_decided(said, wanted),
            "loss": loss / scores.size,
            "per_class": each,
        }


def wanted_of(table: Labels) -> NDArray[np.bool_]:
    """Return which classes every image has (N, C)."""
    wanted = np.zeros((len(table), len(table.names)), np.bool_)
    wanted[np.repeat(np.arange(len(table)), np.diff(table.offsets)), table.classes] = True
    return wanted


def average_precision(scores: Floats, wanted: NDArray[np.bool_]) -> float:
    """Return the mean over recalls of the precision reached there, as scikit-learn defines it.

    Images of one score count together, so that their order does not matter.
    """
    if not wanted.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    hits, taken = np.cumsum(wanted[order]), np.arange(1, len(scores) + 1)
    ends = np.append(np.diff(scores[order]) != 0, True)
    hits, taken = hits[ends], taken[ends]
    return float((np.diff(hits, prepend=0) * hits / taken).sum() / wanted.sum())


def _surprise(scores: Floats, wanted: NDArray[np.bool_]) -> float:
    """Return the sum of the binary cross-entropies of one class."""
    safe = scores.clip(1e-12, 1 - 1e-12)
    return -float(np.where(wanted, np.log(safe), np.log1p(-safe)).sum())


def _decided(said: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> dict[str, float]:
    right = float((said & wanted).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "precision": float(np.float64(right) / said.sum()),
            "recall": float(np.float64(right) / wanted.sum()),
            "f1": float(np.float64(2 * right) / (said.sum() + wanted.sum())),
        }
