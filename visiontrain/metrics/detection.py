"""COCO's average precision, to the bit, whatever the order in which detections arrive."""

from __future__ import annotations

from collections.abc import Sequence

import hotcoco
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.interfaces import Metrics
from visiontrain.core.types import Detections
from visiontrain.metrics.curves import CONFIDENCES, Curves, curves
from visiontrain.metrics.matching import Labels, Truth
from visiontrain.metrics.rows import (
    BOX,
    CLASS,
    COLUMNS,
    IMAGE_COLUMN,
    SCORE,
    Rows,
    canonical,
    to_rows,
    to_xywh,
)

Floats = NDArray[np.float64]
ALL, SMALL, MEDIUM, LARGE = range(4)  # COCO's size ranges: any, below 32², below 96², above
ONE, TEN, HUNDRED = range(3)  # COCO's detections per image and class
AP50, AP75 = 0, 5  # among COCO's overlaps 0.5, 0.55, ... 0.95


class DetectionEvaluator:
    """Scores detections against a table, as pycocotools does with `area` from the table.

    Crowd and difficult boxes are ignored: not missed, and detections on them are no errors.
    A score that no box decides (a class without boxes, no small boxes) is nan.
    """

    def __init__(self, table: Labels) -> None:
        self._table = table
        self._parts: list[Tensor] = []

    def update(self, predictions: Sequence[Detections], ids: Tensor) -> None:
        """Take the predictions of the images `ids` (B,); negative ids only fill a batch."""
        self._parts.append(to_rows(predictions, ids))

    def rows(self) -> Tensor:
        """Return all that was taken, (K, 7): image id, x1, y1, x2, y2, score, class."""
        return torch.cat([torch.empty(0, COLUMNS, dtype=torch.float64), *self._parts])

    def compute(self, rows: Tensor) -> Metrics:
        """Score rows (K, 7) of any order.

        Returns:
            COCO's 12 numbers (`map` ... `ar_large`), `precision`, `recall` and `f1` at overlap
            0.5 and the confidence `conf` at which mean F1 is highest, and `per_class`.

        Raises:
            DivergedError: a detection is not finite.
        """
        table = self._table
        array = canonical(rows, len(table), len(table.names))
        precision, recall = coco_tables(table, array)
        found = curves(table, array)
        return {
            **_average_precisions(precision),
            **_average_recalls(recall),
            **_at_best(found),
            "per_class": _per_class(table, precision, found),
        }


def coco_tables(table: Labels, rows: Rows) -> tuple[Floats, Floats]:
    """Run COCO's evaluation on canonical `rows` (K, 7).

    Returns:
        precision (10 overlaps, 101 recalls, C, 4 sizes, 3 limits) and recall (10, C, 4, 3);
        -1 where a class has no box.
    """
    truth, empty = Truth.of(table), -np.ones((10, len(table.names), 4, 3))
    if not len(truth.boxes):  # nothing to load
        return np.repeat(empty[:, None], 101, axis=1), empty
    known = hotcoco.COCO.from_arrays(
        [
            {"id": row, "width": int(width), "height": int(height)}
            for row, (width, height) in enumerate(table.sizes)
        ],
        [{"id": label, "name": name} for label, name in enumerate(table.names)],
        truth.images,
        truth.classes,
        truth.boxes,
        ids=np.arange(1, len(truth.boxes) + 1),  # 0 means "no match" in COCO's matching
        area=truth.area,
        iscrowd=truth.ignored.astype(np.int64),
    )
    columns = (rows[:, [IMAGE_COLUMN]], to_xywh(rows[:, BOX]), rows[:, [SCORE, CLASS]])
    scoring = hotcoco.COCOeval(known, known.load_res(np.hstack(columns)), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    result = scoring.eval or {}
    return np.asarray(result["precision"]), np.asarray(result["recall"])


def mean_known(values: Floats) -> float:
    """Return the mean of what is decided (not -1), or nan where nothing is."""
    known = values[values > -1]
    return float(known.mean()) if known.size else float("nan")


def _average_precisions(precision: Floats) -> dict[str, float]:
    best = precision[..., HUNDRED]
    return {
        "map": mean_known(best[..., ALL]),
        "map50": mean_known(best[AP50, ..., ALL]),
        "map75": mean_known(best[AP75, ..., ALL]),
        "map_small": mean_known(best[..., SMALL]),
        "map_medium": mean_known(best[..., MEDIUM]),
        "map_large": mean_known(best[..., LARGE]),
    }


def _average_recalls(recall: Floats) -> dict[str, float]:
    return {
        "ar_1": mean_known(recall[..., ALL, ONE]),
        "ar_10": mean_known(recall[..., ALL, TEN]),
        "ar_100": mean_known(recall[..., ALL, HUNDRED]),
        "ar_small": mean_known(recall[..., SMALL, HUNDRED]),
        "ar_medium": mean_known(recall[..., MEDIUM, HUNDRED]),
        "ar_large": mean_known(recall[..., LARGE, HUNDRED]),
    }


def _at_best(found: Curves) -> dict[str, float]:
    """Return the means over classes where mean F1 is highest."""
    best = found.best
    if best is None:
        return dict.fromkeys(("precision", "recall", "f1", "conf"), float("nan"))
    return {
        "precision": float(np.nanmean(found.precision[:, best])),
        "recall": float(np.nanmean(found.recall[:, best])),
        "f1": float(np.nanmean(found.f1[:, best])),
        "conf": float(CONFIDENCES[best]),
    }


def _per_class(table: Labels, precision: Floats, found: Curves) -> dict[str, dict[str, float]]:
    """Return each class's scores, and what they rest on."""
    truth, best = Truth.of(table), found.best or 0  # without boxes all is nan anyway
    seen = np.unique(np.stack([truth.classes, truth.images])[:, ~truth.ignored], axis=1)
    images = np.bincount(seen[0], minlength=len(table.names))
    return {
        name: {
            "map": mean_known(precision[:, :, label, ALL, HUNDRED]),
            "map50": mean_known(precision[AP50, :, label, ALL, HUNDRED]),
            "precision": float(found.precision[label, best]),
            "recall": float(found.recall[label, best]),
            "images": int(images[label]),
            "boxes": int(found.boxes[label]),
        }
        for label, name in enumerate(table.names)
    }
