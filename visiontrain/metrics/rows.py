"""Rows of detections: how predictions become one array, and its one order.

A row is (image id, x1, y1, x2, y2, score, class), float64, pixels of the original image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.errors import DivergedError
from visiontrain.core.types import Detections

COLUMNS = 7
IMAGE_COLUMN, SCORE, CLASS = 0, 5, 6
BOX = slice(1, 5)

Rows = NDArray[np.float64]  # (K, 7)


def to_rows(predictions: Sequence[Detections], ids: Tensor) -> Tensor:
    """Put the predictions of the images `ids` (B,) into rows (K, 7) on the CPU.

    Images with a negative id only fill a place in a batch and are left out.
    """
    parts = [
        torch.cat(
            [
                torch.full((len(found.scores), 1), image, dtype=torch.float64),
                found.boxes.cpu().double(),
                found.scores.cpu().double()[:, None],
                found.classes.cpu().double()[:, None],
            ],
            dim=1,
        )
        for found, image in zip(predictions, ids.tolist(), strict=True)
        if image >= 0
    ]
    return torch.cat(parts) if parts else torch.empty(0, COLUMNS, dtype=torch.float64)


def canonical(rows: Tensor | Rows, images: int, classes: int) -> Rows:
    """Return `rows` (K, 7) by image, best score first, then by class and box.

    Every order of the same rows gives the same array, so scores can't depend on how many
    processes found them.

    Raises:
        DivergedError: a box or a score is not finite.
        ValueError: an image or a class is not in the table, or rows are not (K, 7).
    """
    plain = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else rows
    array = np.asarray(plain, np.float64)
    if array.ndim != 2 or array.shape[1] != COLUMNS:
        raise ValueError(f"detections: got an array of shape {array.shape}; (K, {COLUMNS}) does")
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        raise DivergedError(
            f"evaluation: {bad.sum()} of {len(array)} detections are not finite; "
            "a lower optim.lr or precision=fp32 may help"
        )
    for column, limit, what in ((IMAGE_COLUMN, images, "image"), (CLASS, classes, "class")):
        outside = (array[:, column] < 0) | (array[:, column] >= limit)
        if outside.any():
            got = int(array[outside, column][0])
            raise ValueError(f"detections: {what} {got} is not in the table; 0 to {limit - 1} are")
    x1, y1, x2, y2 = array[:, BOX].T
    keys = (y2, x2, y1, x1, array[:, CLASS], -array[:, SCORE], array[:, IMAGE_COLUMN])
    return array[np.lexsort(keys)]  # the last key counts most


def to_xywh(boxes: NDArray[np.floating]) -> Rows:
    """Turn boxes (K, 4) from corners to left, top, width, height; sides are never negative."""
    boxes = boxes.astype(np.float64)
    return np.hstack([boxes[:, :2], np.maximum(boxes[:, 2:] - boxes[:, :2], 0)])
