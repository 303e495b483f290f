"""Tables of large images as tables of their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.interfaces import ImageSource
from visiontrain.core.types import Batch
from visiontrain.data.dataset import EvalSet
from visiontrain.data.table import Table
from visiontrain.ops.tiles import Tiling, merge_rows

Pixels = NDArray[np.uint8]
VISIBLE = 0.25  # share of what a tile could see of a box from which it is trained on there


class TileImages:
    """An ImageSource of tiles. The image that was read last is kept: its tiles come in a row."""

    def __init__(
        self, source: ImageSource, owner: NDArray[np.int64], rects: NDArray[np.int64]
    ) -> None:
        self.source, self.owner, self.rects = source, owner, rects
        self.last: tuple[int, Pixels] | None = None

    def __len__(self) -> int:
        return len(self.owner)

    def name(self, row: int) -> str:
        """Name tile `row` by its image and its corner."""
        x, y = self.rects[row, :2].tolist()
        return f"{self.source.name(int(self.owner[row]))}@{x},{y}"

    def read(self, row: int) -> Pixels:
        """Return tile `row` (H, W, 3); raise as the source does."""
        owner = int(self.owner[row])
        if self.last is None or self.last[0] != owner:
            self.last = owner, self.source.read(owner)
        x1, y1, x2, y2 = self.rects[row].tolist()
        return self.last[1][y1:y2, x1:x2].copy()


@dataclass(frozen=True, slots=True)
class Tiled:
    """A table of tiles, and where each lies."""

    table: Table
    owner: NDArray[np.int64]  # (T,): row of the image
    rects: NDArray[np.int64]  # (T, 4): x1, y1, x2, y2 in the image


def tiled(table: Table, tiling: Tiling) -> Tiled:
    """Cut every image of a table of boxes into tiles."""
    grids = [tiling.rects(width, height) for width, height in table.sizes.tolist()]
    owner = np.repeat(np.arange(len(grids)), [len(grid) for grid in grids])
    rects = np.concatenate(grids)
    parts = [_boxes_in(table, row, grid) for row, grid in enumerate(grids)]
    index = np.concatenate([part[0] for part in parts])
    boxes = np.concatenate([part[1] for part in parts])
    counts = np.concatenate([part[2] for part in parts])
    shares = np.concatenate([part[3] for part in parts])
    windows = table.windows
    cut = replace(
        table,
        images=TileImages(table.images, owner, rects),
        sizes=(rects[:, 2:] - rects[:, :2]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes.astype(np.float32),
        classes=table.classes[index],
        crowd=table.crowd[index],
        difficult=table.difficult[index],
        area=(table.area[index] * shares).astype(np.float32),
        image_ids=None,
        windows=windows and replace(windows, starts=np.searchsorted(owner, windows.starts)),
    )
    return Tiled(cut, owner, rects)


def _boxes_in(
    table: Table, row: int, grid: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Find the boxes of image `row` in its tiles.

    Returns:
        which boxes of the table (K,), what of each is seen, in pixels of the tile (K, 4), how many
        each tile has (T,), and the share of each that is seen (K,).
    """
    rows = table.rows(row)
    boxes = table.boxes[rows].astype(np.float64)
    low, high = np.tile(grid[:, :2], 2)[:, None], np.tile(grid[:, 2:], 2)[:, None]  # (T, 1, 4)
    seen = np.clip(boxes[None], low, high)  # (T, M, 4)
    shares = _areas(seen) / np.maximum(_areas(boxes), 1e-9)
    # Of an object longer or higher than a tile, none could see a quarter.
    sides = np.minimum(
        boxes[:, 2:] - boxes[:, :2], (grid[:, 2:] - grid[:, :2])[:, None]
    )  # (T, M, 2)
    possible = _areas(seen) / np.maximum(sides.prod(axis=-1), 1e-9)
    # A crowd tells where nothing is to be learned, however little of it is in sight.
    kept = np.where(table.crowd[rows], shares > 0, possible >= VISIBLE)
    tile, box = np.nonzero(kept)
    corner = np.tile(grid[:, :2], 2)[tile]
    return box + rows.start, seen[tile, box] - corner, kept.sum(axis=1), shares[tile, box]


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)


class TiledEval:
    """Every tile of every image once; `table` is that of the whole images, which are scored."""

    def __init__(self, table: Table, imgsz: int, tiling: Tiling, most: int) -> None:
        self.table, self.most = table, most  # most: detections kept of an image
        self.tiles = tiled(table, tiling)
        self.samples = EvalSet(self.tiles.table, imgsz)

    def __len__(self) -> int:
        return len(self.samples)

    def cell(self, rows: Sequence[int]) -> Batch:
        """Return the tiles `rows`, whose ids are the tiles'; a blank one for none."""
        return self.samples.cell(rows)

    def merge(self, rows: Tensor) -> Tensor:
        """Turn detections (K, 7) of tiles into those of images: id, box, score, class."""
        rects = self.tiles.rects.astype(np.float64)
        found = merge_rows(rows.numpy(), self.tiles.owner, rects, self.most)
        return torch.from_numpy(found)
