"""Scenes composed at load time from the real handwritten digits that ship with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import derive, generator
from visiontrain.data.build import whole_images
from visiontrain.data.description import SPLITS, Choice, Description
from visiontrain.data.table import Table

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]

NAMES: tuple[str, ...] = tuple("0123456789")
SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}  # of each class's digits
CELL = 8  # side of a digit in the grid, pixels
SIDE = 32  # of a digit to classify, pixels
INK = 0.35  # coverage from which a pixel counts as ink, for the box
MAX_OVERLAP = 0.05  # shared area of two boxes, relative to the smaller one
TRIES = 12  # places tried for a digit before it is made smaller


@dataclass(frozen=True, slots=True)
class Recipe:
    """What scenes look like; with a split and an index it determines every pixel."""

    canvas: int = 160  # side, pixels
    digits: tuple[int, int] = (2, 8)  # fewest, most per scene
    heights: tuple[int, int] = (20, 64)  # of a digit, pixels


class DigitReader:
    """The embedded scenes, as a data set: `train`, `val` and `test` say how many there are."""

    names = NAMES
    several = False
    notes: tuple[str, ...] = ()

    def __init__(self, description: Description) -> None:
        self.task = description.task or "detect"
        description.check_keys((*SPLITS, "canvas", "digits", "heights"))
        values, default = description.values, Recipe()
        self.root = description.folder
        self.recipe = Recipe(
            canvas=values.get("canvas", default.canvas),
            digits=_pair(description, "digits", default.digits),
            heights=_pair(description, "heights", default.heights),
        )
        self.splits: Mapping[str, Any] = {
            split: values[split] for split in SPLITS if values.get(split)
        }
        for key, value in {"canvas": self.recipe.canvas, **self.splits}.items():
            if not isinstance(value, int) or value < 1:
                raise description.fail(key, f"got {value!r}", "give a positive number")
        if self.recipe.heights[1] * 1.5 > self.recipe.canvas:
            raise description.fail("heights", f"up to {self.recipe.heights[1]}", "enlarge canvas")

    def read(self, split: str, choice: Choice) -> Table:
        """Compose as many scenes as are asked for, not only as many as there are by default.

        For classification there are the single digits.
        """
        if self.task == "classify":
            return single_digits(split, choice)
        total = choice.images or self.splits[split]
        return compose(self.recipe, split, max(1, round(total * choice.fraction)))


def _pair(description: Description, key: str, default: tuple[int, int]) -> tuple[int, int]:
    value = description.values.get(key, list(default))
    match value:
        case [int(low), int(high)] if 1 <= low <= high:
            return low, high
    raise description.fail(key, f"got {value!r}", "give [least, most]")


class DigitScenes:
    """An ImageSource of composed scenes; scene i is the same whatever the number of scenes."""

    def __init__(self, recipe: Recipe, split: str, count: int) -> None:
        self.recipe = recipe
        self.split = split
        self.glyphs, self.labels = load_glyphs(split)
        layouts = [self._layout(row) for row in range(count)]
        self.offsets = np.concatenate([[0], np.cumsum([len(rows) for rows in layouts])])
        # (K, 7): number of the glyph, width and height it is scaled to, then its ink's box
        digits = [digit for layout in layouts for digit in layout]
        self.digits = np.array(digits, np.int32).reshape(-1, 7)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def name(self, row: int) -> str:
        """Name scene `row`."""
        return f"digits/{self.split}/{row:06d}"

    def read(self, row: int) -> Pixels:
        """Compose scene `row` (canvas, canvas, 3)."""
        random = generator("digits", self.split, row, "paint")
        image = background(self.recipe.canvas, random)
        add_clutter(image, random)
        for glyph, width, height, *box in self.digits[slice(*self.offsets[row : row + 2])]:
            add_ink(image, box, enlarge(self.glyphs[glyph], width, height), random)
        return add_noise(image, random)

    def _layout(self, row: int) -> list[list[int]]:
        """Draw which digits are in scene `row`, and where; at least one."""
        random = generator("digits", self.split, row, "layout")
        low, high = self.recipe.digits
        placed: list[list[int]] = []
        for _ in range(int(random.integers(low, high + 1))):
            placed += self._place(int(random.integers(len(self.glyphs))), random, placed)
        return placed

    def _place(
        self, glyph: int, random: np.random.Generator, placed: list[list[int]]
    ) -> list[list[int]]:
        """Find room for a digit, making it smaller where there is none; return 0 or 1 rows."""
        low, high = self.recipe.heights
        height = low * (high / low) ** random.random()
        stretch = random.uniform(0.85, 1.15)
        others = np.array(placed, np.int64).reshape(-1, 7)[:, 3:]
        while height >= low:
            size = round(height * stretch), round(height)
            ink = enlarge(self.glyphs[glyph], *size).shape[::-1]
            corners = random.integers(0, self.recipe.canvas - np.array(ink) + 1, (TRIES, 2))
            boxes = np.hstack([corners, corners + ink])
            free = np.flatnonzero((overlaps(boxes, others) <= MAX_OVERLAP).all(axis=1))
            if len(free):
                return [[glyph, *size, *boxes[free[0]].tolist()]]
            height *= 0.75
        return []


class SingleDigits:
    """An ImageSource of the digits themselves, enlarged to `SIDE` pixels."""

    def __init__(self, split: str, glyphs: Pixels) -> None:
        self.split, self.glyphs = split, glyphs

    def __len__(self) -> int:
        return len(self.glyphs)

    def name(self, row: int) -> str:
        """Name digit `row`."""
        return f"digits/{self.split}/digit{row:04d}"

    def read(self, row: int) -> Pixels:
        """Return digit `row` (SIDE, SIDE, 3), white on black."""
        large = cv2.resize(self.glyphs[row], (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        return np.repeat(np.asarray(large, np.uint8)[..., None], 3, axis=2)


def load_glyphs(split: str) -> tuple[Pixels, NDArray[np.int32]]:
    """Return the digits of `split` (N, 8, 8) and their labels (N,); splits share none.

    Each class is put in a fixed order (by hash of the digit's number) and cut by `SHARES`.
    """
    folder = files("visiontrain.data") / "assets"
    raw = np.frombuffer(folder.joinpath("digits.png").read_bytes(), np.uint8)
    grid = np.asarray(cv2.imdecode(raw, cv2.IMREAD_GRAYSCALE), np.uint8)
    text = json.loads(folder.joinpath("digits.json").read_text())["labels"]
    labels = np.array([int(character) for character in text], np.int32)
    rows, columns = (side // CELL for side in grid.shape)
    cells = grid.reshape(rows, CELL, columns, CELL).swapaxes(1, 2).reshape(-1, CELL, CELL)
    start, stop = SHARES[split]
    chosen: list[int] = []
    for label in range(len(NAMES)):
        keyed = [(derive("digits", int(i)), int(i)) for i in np.flatnonzero(labels == label)]
        ordered = [i for _, i in sorted(keyed)]
        chosen += ordered[round(start * len(ordered)) : round(stop * len(ordered))]
    return np.ascontiguousarray(cells[chosen]), labels[chosen]


def enlarge(glyph: Pixels, width: int, height: int) -> Floats:
    """Scale a digit's cell (8, 8) smoothly and cut it to its ink (h, w): coverage, 0 to 1."""
    border = CELL // 4  # else the pen's edge is cut off at the cell's
    ink = cv2.copyMakeBorder(glyph, border, border, border, border, cv2.BORDER_CONSTANT)
    size = width * len(ink) // CELL, height * len(ink) // CELL
    smooth = cv2.resize(ink.astype(np.float32) / 240, size, interpolation=cv2.INTER_CUBIC)
    alpha = np.clip((smooth - 0.33) / 0.4, 0, 1)  # a pen's edge instead of a blur
    x, y, width, height = cv2.boundingRect((alpha > INK).astype(np.uint8))
    return alpha[y : y + height, x : x + width]


def overlaps(one: NDArray[np.int64], two: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the areas that boxes (N, 4) and (M, 4) share, relative to the smaller one (N, M)."""
    top_left = np.maximum(one[:, None, :2], two[None, :, :2])
    bottom_right = np.minimum(one[:, None, 2:], two[None, :, 2:])
    shared = np.prod(np.clip(bottom_right - top_left, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, two)]
    return shared / np.minimum(areas[0][:, None], areas[1][None])


def background(side: int, random: np.random.Generator) -> Pixels:
    """Return a smooth gradient (side, side, 3) of moderate brightness."""
    base = random.uniform(50, 205) + random.uniform(-25, 25, 3)
    knots = base + random.uniform(-30, 30, (3, 3, 1)) + random.uniform(-10, 10, (3, 3, 3))
    knots = np.clip(knots, 0, 255).astype(np.float32)
    smooth = cv2.resize(knots, (side, side), interpolation=cv2.INTER_LINEAR)
    return smooth.astype(np.uint8)


def add_clutter(image: Pixels, random: np.random.Generator) -> None:
    """Draw blobs and lines that are no digits, in colours near the background's."""
    side = len(image)

    def point() -> tuple[int, int]:
        x, y = random.integers(0, side, 2)
        return int(x), int(y)

    def colour(at: tuple[int, int]) -> tuple[float, ...]:
        change = random.uniform(15, 50) * random.choice((-1, 1)) + random.uniform(-15, 15, 3)
        return tuple(np.clip(image[at[1], at[0]] + change, 0, 255).tolist())

    for _ in range(random.integers(0, 4)):
        centre = point()
        axes = random.integers(side // 40 + 1, side // 6 + 2, 2).tolist()
        angle = random.uniform(0, 180)
        cv2.ellipse(image, centre, axes, angle, 0, 360, colour(centre), -1, cv2.LINE_AA)
    for _ in range(random.integers(0, 5)):
        start, thickness = point(), int(random.integers(1, 4))
        cv2.line(image, start, point(), colour(start), thickness, cv2.LINE_AA)


def add_ink(image: Pixels, box: list[int], alpha: Floats, random: np.random.Generator) -> None:
    """Blend a digit into `image`, lighter or darker than what is under it."""
    x1, y1, x2, y2 = box
    patch = image[y1:y2, x1:x2].astype(np.float32)
    under = patch.mean(axis=(0, 1))
    contrast = random.uniform(70, 150) * random.choice((-1, 1))
    if not 0 <= under.mean() + contrast <= 255:
        contrast = -contrast
    ink = np.clip(under + contrast + random.uniform(-35, 35, 3), 0, 255)
    image[y1:y2, x1:x2] = patch + alpha[..., None] * (ink.astype(np.float32) - patch) + 0.5


def add_noise(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return `image` with uniform noise of up to 12 grey levels to either side."""
    strength = random.uniform(0, 12) / 128
    noise = np.frombuffer(random.bytes(image.size), np.uint8).reshape(image.shape)
    return np.asarray(cv2.addWeighted(image, 1.0, noise, strength, -128 * strength), np.uint8)


def compose(recipe: Recipe, split: str, count: int) -> Table:
    """Return the table of the first `count` scenes of `split`."""
    scenes = DigitScenes(recipe, split, count)
    boxes = scenes.digits[:, 3:].astype(np.float32)
    return Table(
        names=NAMES,
        images=scenes,
        sizes=np.full((count, 2), recipe.canvas, np.int32),
        offsets=scenes.offsets.astype(np.int64),
        boxes=boxes,
        classes=scenes.labels[scenes.digits[:, 0]],
        crowd=np.zeros(len(boxes), np.bool_),
        difficult=np.zeros(len(boxes), np.bool_),
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
    )


def single_digits(split: str, choice: Choice) -> Table:
    """Return the table of the digits of `split`, each with its class."""
    glyphs, labels = load_glyphs(split)
    rows = choice.rows(len(glyphs))
    sizes = np.full((len(rows), 2), SIDE, np.int32)
    source = SingleDigits(split, np.ascontiguousarray(glyphs[rows]))
    return whole_images(NAMES, source, sizes, labels[rows], np.ones(len(rows), np.int64))
