"""Place images on a canvas at a scale and offset: alone, or four of them as a mosaic.

Scale and shift are the whole geometry, so each image is resized once, only where it shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.data.letterbox import GREY

MIN_SIDE = 2.0  # pixels a side that must remain of a box
MIN_SHARE = 0.1  # of a box's area that must remain

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]  # (M, 6) targets


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an image goes: canvas = image * scale + (x, y), seen through a window."""

    scale: float
    x: float
    y: float
    window: tuple[int, int, int, int]  # x1, y1, x2, y2 of the canvas


def blank(side: int) -> Pixels:
    """Return a grey canvas (side, side, 3)."""
    return np.full((side, side, 3), GREY, np.uint8)


def place(image: Pixels, rows: Rows, where: Placement, canvas: Pixels) -> Rows:
    """Draw `image` onto `canvas` in place; return its boxes there, cut to what shows."""
    height, width = image.shape[:2]
    corners = np.array([0, 0, width, height]) * where.scale + [where.x, where.y] * 2
    left, top, right, bottom = where.window
    x1, y1 = max(left, round(corners[0])), max(top, round(corners[1]))
    x2, y2 = min(right, round(corners[2])), min(bottom, round(corners[3]))
    if x2 <= x1 or y2 <= y1:
        return rows[:0]
    matrix = np.array([[where.scale, 0, where.x - x1], [0, where.scale, where.y - y1]], np.float64)
    # Pixel centres: the point (0.5, 0.5) of the image must land at scale / 2 + offset.
    matrix[:, 2] += where.scale / 2 - 0.5
    canvas[y1:y2, x1:x2] = cv2.warpAffine(
        image, matrix, (x2 - x1, y2 - y1), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    moved = rows.copy()
    moved[:, 1:5] = rows[:, 1:5] * where.scale + np.array([where.x, where.y] * 2, np.float32)
    return cut(moved, (x1, y1, x2, y2))


def cut(rows: Rows, window: tuple[int, int, int, int]) -> Rows:
    """Clip boxes to `window`; drop those of which too little remains."""
    x1, y1, x2, y2 = window
    sides = rows[:, 3:5] - rows[:, 1:3]
    clipped = rows.copy()
    clipped[:, 1:5:2] = rows[:, 1:5:2].clip(x1, x2)
    clipped[:, 2:5:2] = rows[:, 2:5:2].clip(y1, y2)
    left = clipped[:, 3:5] - clipped[:, 1:3]
    share = left.prod(1) / np.maximum(sides.prod(1), 1e-9)
    return clipped[(left >= MIN_SIDE).all(1) & (share >= MIN_SHARE)]


def tiles(
    sizes: list[tuple[int, int]], side: int, zoom: float, centre: tuple[float, float]
) -> list[Placement]:
    """Return where four images of `sizes` (width, height) go around `centre`.

    Each keeps its aspect, its longer side being `zoom` canvases long, and one corner at the
    centre: top left, top right, bottom left, bottom right.
    """
    cx, cy = round(centre[0]), round(centre[1])
    windows = [(0, 0, cx, cy), (cx, 0, side, cy), (0, cy, cx, side), (cx, cy, side, side)]
    placements = []
    for k, ((width, height), window) in enumerate(zip(sizes, windows, strict=True)):
        scale = side / max(width, height) * zoom
        x = cx - width * scale if k % 2 == 0 else cx
        y = cy - height * scale if k < 2 else cy
        placements.append(Placement(scale, x, y, window))
    return placements
