"""Samples of a table: augmented for training, letterboxed for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.seed import generator
from visiontrain.core.types import Batch, Item
from visiontrain.data.augment import Augment
from visiontrain.data.collate import collate
from visiontrain.data.config import AugmentConfig, AugmentSection, sides
from visiontrain.data.letterbox import boxed, letterbox
from visiontrain.data.mosaic import Placement, blank, place, tiles
from visiontrain.data.order import SHUFFLED, Order
from visiontrain.data.own_change import Found, changed
from visiontrain.data.reader import Reader
from visiontrain.data.sampler import Key
from visiontrain.data.table import Table
from visiontrain.data.warp import blend, draw_matrix, paste, warp, warps

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]  # (M, 6) targets


class EvalSet:
    """Every image once, letterboxed, nothing random."""

    def __init__(self, table: Table, imgsz: int) -> None:
        self.table, self.imgsz = table, imgsz
        self.reader = Reader(table)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Item:
        """Return image `index`; an unreadable one is replaced, under its own id, by grey."""
        image = self.reader.read(index)
        if image is None:
            width, height = (int(side) for side in self.table.sizes[index])
            image = np.full((height, width, 3), 114, np.uint8)
        square, frame = letterbox(image, self.imgsz)
        return Item(square, boxed(self.table.targets(index), frame), frame, index)

    def cell(self, rows: Sequence[int]) -> Batch:
        """Return the images of `rows`; a blank one for none."""
        return collate([self[row] for row in rows], self.imgsz)

    def merge(self, rows: Tensor) -> Tensor:
        """Return rows as they are: whole images are looked at."""
        return rows


class TrainSet:
    """Augmented samples; each is a pure function of (seed, epoch, entry) and the files."""

    def __init__(
        self,
        table: Table,
        imgsz: int,
        augment: AugmentSection,
        *,
        seed: int,
        epochs: int,
        order: Order = SHUFFLED,
    ) -> None:
        self.order = order
        self.table, self.imgsz, self.seed, self.epochs = table, imgsz, seed, epochs
        self.reader, self.sides = Reader(table), sides(imgsz, augment)
        self.change = Augment(augment) if isinstance(augment, AugmentConfig) else None
        self.own = augment.own.value if augment.own is not None else None

    def __len__(self) -> int:
        return len(self.table)

    def at(self, step: int) -> TrainSet:
        """Return this set with samples of the side that step `step` has: multiples of 32."""
        if len(self.sides) == 1:
            return self
        other = copy(self)
        other.imgsz = self.sides[generator(self.seed, "side", step).integers(len(self.sides))]
        return other

    def cell(self, keys: Sequence[Key], step: int) -> Batch:
        """Return the samples of `keys` (epoch, entry), all of one step; a blank one for none."""
        sized = self.at(step)
        return collate([sized[key] for key in keys], sized.imgsz)

    def __getitem__(self, key: Key) -> Item:
        """Return the sample of `key`: (epoch, entry of the order)."""
        epoch, wanted = key
        found = self._read(wanted % len(self.table), epoch, wanted)
        row = found.row
        if self.change is None:
            square, frame = letterbox(found.image, self.imgsz)
            return Item(square, boxed(found.targets, frame), frame, row)
        config = self.change.config
        made = self._placed(found, key, config)
        for name, share, join in (
            ("mixup", config.mixup, blend),
            ("paste", config.copy_paste, paste),
        ):
            random = generator(self.seed, name, epoch, wanted)
            if share and random.random() < share:
                (other,) = self._partners(key, random, 1, name)
                made = join(made, self._placed(other, key, config, name), random)
        square, rows = self.change(*made, (self.seed, epoch, wanted))
        side = self.imgsz
        return Item(square, rows, np.array([1, 0, 0, side, side], np.float32), row)

    def _read(self, wanted: int, *stream: int | str) -> Found:
        """Read an image and its targets; the user's own change draws by `stream` and row."""
        row, image = self.reader.readable(wanted)
        found = Found(row, image, self.table.targets(row))
        if self.own is None:
            return found
        random = generator(self.seed, "own", *stream, row)
        return changed(found, self.own, random, len(self.table.names))

    def _partners(
        self, key: Key, random: np.random.Generator, count: int, *stream: int | str
    ) -> list[Found]:
        """Draw other images, and read them."""
        epoch, wanted = key
        drawn = self.order.draw(random, count, wanted, len(self.table), (self.seed, epoch))
        return [
            self._read(row, epoch, wanted, *stream, number)
            for number, row in enumerate(drawn.tolist())
        ]

    def _placed(
        self, found: Found, key: Key, config: AugmentConfig, *more: str
    ) -> tuple[Pixels, Rows]:
        """Put an image, alone or with three others, on a canvas, which is then turned or tilted."""
        epoch, wanted = key
        # Never more than half of a short run goes without mosaic.
        with_mosaic = self.epochs - min(config.close_mosaic, self.epochs // 2)
        random = generator(self.seed, "place", epoch, wanted, *more)
        mosaic = epoch < with_mosaic and random.random() < config.mosaic
        if mosaic:
            partners = self._partners(key, random, 3, "tile", *more)
            square, rows = self._four([found, *partners], random, config)
        else:
            square, rows = self._one(found, random, config)
        if warps(config):
            square, rows = warp(square, rows, draw_matrix(config, self.imgsz, random))
        return square, rows

    def _one(
        self, found: Found, random: np.random.Generator, config: AugmentConfig
    ) -> tuple[Pixels, Rows]:
        """Zoom and shift one image."""
        side = self.imgsz
        height, width = found.image.shape[:2]
        scale = side / max(height, width) * _zoom(random, config)
        shift = random.uniform(-config.translate, config.translate, 2) * side
        x, y = (side - width * scale) / 2 + shift[0], (side - height * scale) / 2 + shift[1]
        canvas = blank(side)
        where = Placement(scale, float(x), float(y), (0, 0, side, side))
        return canvas, place(found.image, found.targets, where, canvas)

    def _four(
        self, chosen: Sequence[Found], random: np.random.Generator, config: AugmentConfig
    ) -> tuple[Pixels, Rows]:
        """Put four images around a point near the middle."""
        side = self.imgsz
        sizes = [(one.image.shape[1], one.image.shape[0]) for one in chosen]
        centre = random.uniform(side * 0.25, side * 0.75, 2)
        canvas = blank(side)
        where = tiles(sizes, side, _zoom(random, config), (float(centre[0]), float(centre[1])))
        parts = [
            place(one.image, one.targets, spot, canvas)
            for one, spot in zip(chosen, where, strict=True)
        ]
        return canvas, np.concatenate(parts)


def _zoom(random: np.random.Generator, config: AugmentConfig) -> float:
    return float(random.uniform(1 - config.scale, 1 + config.scale))
