"""Samples of a table: augmented for training, letterboxed for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator
from visiontrain.core.types import Batch, Sample
from visiontrain.data.augment import Augment
from visiontrain.data.collate import collate
from visiontrain.data.config import AugmentConfig, AugmentSection, sides
from visiontrain.data.letterbox import boxed, letterbox
from visiontrain.data.mosaic import Placement, blank, place, tiles
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

    def __getitem__(self, index: int) -> Sample:
        """Return image `index`; an unreadable one is replaced, under its own id, by grey."""
        image = self.reader.read(index)
        if image is None:
            width, height = (int(side) for side in self.table.sizes[index])
            image = np.full((height, width, 3), 114, np.uint8)
        square, frame = letterbox(image, self.imgsz)
        return Sample(square, boxed(self.table.targets(index), frame), frame, index)

    def cell(self, rows: Sequence[int]) -> Batch:
        """Return the images of `rows`; a blank one for none."""
        return collate([self[row] for row in rows], self.imgsz)


class TrainSet:
    """Augmented samples; each is a pure function of (seed, epoch, row) and the files."""

    def __init__(
        self, table: Table, imgsz: int, augment: AugmentSection, *, seed: int, epochs: int
    ) -> None:
        self.table, self.imgsz, self.seed, self.epochs = table, imgsz, seed, epochs
        self.reader, self.sides = Reader(table), sides(imgsz, augment)
        self.change = Augment(augment) if isinstance(augment, AugmentConfig) else None

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
        """Return the samples of `keys` (epoch, row), all of one step; a blank one for none."""
        sized = self.at(step)
        return collate([sized[key] for key in keys], sized.imgsz)

    def __getitem__(self, key: Key) -> Sample:
        """Return the sample of `key`: (epoch, row)."""
        epoch, wanted = key
        row, image = self.reader.readable(wanted)
        if self.change is None:
            square, frame = letterbox(image, self.imgsz)
            return Sample(square, boxed(self.table.targets(row), frame), frame, row)
        config = self.change.config
        made = self._placed((row, image), key, config)
        for name, share, join in (
            ("mixup", config.mixup, blend),
            ("paste", config.copy_paste, paste),
        ):
            random = generator(self.seed, name, epoch, wanted)
            if share and random.random() < share:
                other = self.reader.readable(self._partners(key, random, 1)[0])
                made = join(made, self._placed(other, key, config, name), random)
        square, rows = self.change(*made, (self.seed, epoch, wanted))
        side = self.imgsz
        return Sample(square, rows, np.array([1, 0, 0, side, side], np.float32), row)

    def _placed(
        self, found: tuple[int, Pixels], key: Key, config: AugmentConfig, *more: str
    ) -> tuple[Pixels, Rows]:
        """Put an image, alone or with three others, on a canvas, which is then turned or tilted."""
        epoch, wanted = key
        # Never more than half of a short run goes without mosaic.
        with_mosaic = self.epochs - min(config.close_mosaic, self.epochs // 2)
        random = generator(self.seed, "place", epoch, wanted, *more)
        mosaic = epoch < with_mosaic and random.random() < config.mosaic
        if mosaic:
            square, rows = self._four(found, key, random, config)
        else:
            square, rows = self._one(*found, random, config)
        if warps(config):
            square, rows = warp(square, rows, draw_matrix(config, self.imgsz, random))
        return square, rows

    def _one(
        self, row: int, image: Pixels, random: np.random.Generator, config: AugmentConfig
    ) -> tuple[Pixels, Rows]:
        """Zoom and shift one image."""
        side = self.imgsz
        height, width = image.shape[:2]
        scale = side / max(height, width) * _zoom(random, config)
        shift = random.uniform(-config.translate, config.translate, 2) * side
        x, y = (side - width * scale) / 2 + shift[0], (side - height * scale) / 2 + shift[1]
        canvas = blank(side)
        where = Placement(scale, float(x), float(y), (0, 0, side, side))
        return canvas, place(image, self.table.targets(row), where, canvas)

    def _partners(self, key: Key, random: np.random.Generator, count: int) -> list[int]:
        """Draw rows to mix with the one of `key`; of shards, from those that are read with it."""
        epoch, row = key
        if self.table.windows is None:
            return random.integers(len(self.table), size=count).tolist()
        return self.table.windows.draw(row, self.seed, epoch, random, count).tolist()

    def _four(
        self,
        found: tuple[int, Pixels],
        key: Key,
        random: np.random.Generator,
        config: AugmentConfig,
    ) -> tuple[Pixels, Rows]:
        """Put the image and three others around a point near the middle."""
        side = self.imgsz
        drawn = self._partners(key, random, 3)
        chosen = [found, *(self.reader.readable(partner) for partner in drawn)]
        sizes = [(pixels.shape[1], pixels.shape[0]) for _, pixels in chosen]
        centre = random.uniform(side * 0.25, side * 0.75, 2)
        canvas = blank(side)
        where = tiles(sizes, side, _zoom(random, config), (float(centre[0]), float(centre[1])))
        parts = [
            place(pixels, self.table.targets(r), spot, canvas)
            for (r, pixels), spot in zip(chosen, where, strict=True)
        ]
        return canvas, np.concatenate(parts)


def _zoom(random: np.random.Generator, config: AugmentConfig) -> float:
    return float(random.uniform(1 - config.scale, 1 + config.scale))
