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
    """Where an image should go: canvas = image * scale + (x, y), seen through a window."""

    scale: float
    x: float
    y: float
    window: tuple[int, int, int, int]  # x1, y1, x2, y2 of the canvas


@dataclass(frozen=True, slots=True)
class Span:
    """One axis of a placed image: pixels `source` of it become pixels `target` of the canvas."""

    source: slice
    target: slice

    @property
    def size(self) -> int:
        """Return how many pixels of the canvas it covers."""
        return self.target.stop - self.target.start

    def move(self, places: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return where coordinates of the image lie on the canvas."""
        scale = self.size / (self.source.stop - self.source.start)
        return (places - self.source.start) * scale + self.target.start


def blank(side: int) -> Pixels:
    """Return a grey canvas (side, side, 3)."""
    return np.full((side, side, 3), GREY, np.uint8)


def place(image: Pixels, rows: Rows, where: Placement, canvas: Pixels) -> Rows:
    """Draw `image` onto `canvas` in place; return its boxes there, cut to what shows."""
    height, width = image.shape[:2]
    left, top, right, bottom = where.window
    across = _span(width, where.scale, where.x, (left, right))
    down = _span(height, where.scale, where.y, (top, bottom))
    if across is None or down is None:
        return rows[:0]
    shown = image[down.source, across.source]
    canvas[down.target, across.target] = cv2.resize(shown, (across.size, down.size))
    moved = rows.copy()
    moved[:, 1:5:2] = across.move(rows[:, 1:5:2])
    moved[:, 2:5:2] = down.move(rows[:, 2:5:2])
    x, y = across.target, down.target
    return cut(moved, (x.start, y.start, x.stop, y.stop))


def _span(size: int, scale: float, offset: float, window: tuple[int, int]) -> Span | None:
    """Find which pixels of an axis show in `window`, and where; None when none does.

    Both ends are whole pixels on both sides, so `scale` is met up to rounding; boxes move by
    what is really drawn.
    """
    start = max(window[0], round(offset))
    stop = min(window[1], round(offset + size * scale))
    if stop <= start:
        return None
    first = min(max(round((start - offset) / scale), 0), size - 1)
    last = min(max(round((stop - offset) / scale), first + 1), size)
    return Span(slice(first, last), slice(start, stop))


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
