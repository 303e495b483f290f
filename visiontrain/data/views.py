"""Pictures for classification: squares of one side, cropped, shifted, flipped and recoloured."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator, uniforms
from visiontrain.data.augment import Colours
from visiontrain.data.config import ClassifyAugment
from visiontrain.data.letterbox import GREY
from visiontrain.data.own import reads_own
from visiontrain.data.own_change import repainted
from visiontrain.data.policy import POLICY_DRAWS, apply_policy
from visiontrain.data.reader import Reader
from visiontrain.data.table import Table

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]
Stream = tuple[int | str, ...]  # what draws hang on beside the row: seed, epoch, what for
SMALL = 64  # side up to which all pictures are kept, pixels
ROOM = 2**32  # bytes that they may take
THREADS = 8
RATIO = (3 / 4, 4 / 3)  # of a crop's sides, as in Inception's (Szegedy et al. 2014)
TRIES = 10


class Views(Protocol):
    """Makes the pictures of a batch."""

    def __call__(self, entries: Rows, stream: Stream) -> tuple[Pixels, Rows]:
        """Return pictures (B, S, S, 3) for `entries` (B,), and the rows that were read for them.

        What is drawn hangs on the entry: a row that comes twice looks different.
        """
        ...


def build_views(table: Table, side: int, config: ClassifyAugment) -> Views:
    """Choose how the pictures of a training set are made."""
    small = side <= SMALL and len(table) * side * side * 3 <= ROOM
    if small and config.keeps_squares:
        return SmallViews(table, side, config)
    return FileViews(table, side, config)


class SmallViews:
    """All pictures in one array, moved batch by batch; policies alone take them one by one."""

    def __init__(self, table: Table, side: int, config: ClassifyAugment) -> None:
        self.config = config
        self.pixels, self.rows = squares(table, side)

    def __call__(self, entries: Rows, stream: Stream) -> tuple[Pixels, Rows]:
        """Look pictures up, pixel by pixel."""
        found, side = self.rows[entries % len(self.rows)], self.pixels.shape[1]
        down, across = moves(entries, stream, side, self.config)
        index = (found[:, None] * side + down)[:, :, None] * side + across[:, None, :]
        pictures = self.pixels.reshape(-1, 3).take(index, axis=0)
        if self.config.auto != "none":
            draws = uniforms((*stream, "policy"), entries, POLICY_DRAWS)
            for k, drawn in enumerate(draws):
                pictures[k] = apply_policy(pictures[k], self.config.auto, drawn)
        return pictures, found


def moves(rows: Rows, stream: Stream, side: int, config: ClassifyAugment) -> tuple[Rows, Rows]:
    """Draw shifts and flips.

    Returns:
        which lines and which columns each moved picture is made of, (B, S) each; shifts mirror
        the border.
    """
    reach, draws = round(config.translate * side), uniforms((*stream, "move"), rows, 3)
    shifts = (draws[:, :2] * (2 * reach + 1)).astype(np.int64) - reach  # (B, 2)
    across, down = (_mirrored(np.arange(side) + shifts[:, k : k + 1], side) for k in (0, 1))
    left, over = flipped(rows, stream, config.fliplr), draws[:, 2] < config.flipud
    across = np.where(left[:, None], across[:, ::-1], across)
    return np.where(over[:, None], down[:, ::-1], down), across


def moved(picture: Pixels, down: Rows, across: Rows) -> Pixels:
    """Return the lines `down` (S,) and the columns `across` (S,) of a picture (S, S, 3)."""
    last = len(down) - 1
    if {*down[[0, -1]].tolist()} | {*across[[0, -1]].tolist()} != {0, last}:  # shifted
        return picture[down][:, across]
    if down[0] == last:
        picture = np.asarray(cv2.flip(picture, 0), np.uint8)
    return np.asarray(cv2.flip(picture, 1), np.uint8) if across[0] == last else picture


def _mirrored(index: Rows, side: int) -> Rows:
    """Reflect places outside of 0 to side - 1 back inside, without repeating the border."""
    index = np.abs(index)
    return np.where(index >= side, 2 * (side - 1) - index, index)


def flipped(rows: Rows, stream: Stream, share: float) -> NDArray[np.bool_]:
    """Tell which rows (B,) are mirrored left-right.

    At a half, each is in every other epoch (Jordan 2024, arXiv 2404.00498): chance would show a
    quarter of them the same way round twice in a row.
    """
    seed, epoch, *what = stream
    if share == 0.5:
        first = uniforms((seed, "first flip", *what), rows, 1)[:, 0] < 0.5
        return first ^ bool(int(epoch) % 2)
    return uniforms((*stream, "flip"), rows, 1)[:, 0] < share


def squares(table: Table, side: int) -> tuple[Pixels, Rows]:
    """Read the middle square of every picture.

    Returns:
        pictures (N, S, S, 3), and for each row the one that takes its place (N,): itself, or the
        next that can be read.
    """
    reader = Reader(table)
    pixels = np.full((len(table), side, side, 3), GREY, np.uint8)
    good = np.zeros(len(table), np.bool_)

    def read(row: int) -> None:
        image = reader.read(row)
        if image is not None:
            pixels[row], good[row] = centre(image, side), True

    if reads_own(table.images):
        for row in range(len(table)):
            read(row)
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(read, range(len(table)), chunksize=256):
                pass
    rows = np.arange(len(table))
    if not good.all():
        for row in np.flatnonzero(~good):
            rows[row], image = reader.readable(int(row))  # itself, if it was withheld before
            pixels[rows[row]] = centre(image, side)
    return pixels, rows


def centre(image: Pixels, side: int) -> Pixels:
    """Return the largest square in the middle of a picture, resized to `side`."""
    height, width = image.shape[:2]
    cut = min(height, width)
    top, left = (height - cut) // 2, (width - cut) // 2
    return resized(image[top : top + cut, left : left + cut], side)


def resized(image: Pixels, side: int) -> Pixels:
    """Return a picture (H, W, 3) as (side, side, 3); averaged where it shrinks to less than half.

    Up to there the four neighbours that are blended leave hardly a pixel out, at a fifth of the
    time.
    """
    if image.shape[:2] == (side, side):
        return image
    how = cv2.INTER_AREA if max(image.shape[:2]) > 2 * side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(image, (side, side), interpolation=how), np.uint8)


class FileViews:
    """Pictures read one by one: cropped, then changed."""

    def __init__(self, table: Table, side: int, config: ClassifyAugment) -> None:
        self.reader, self.side, self.config = Reader(table), side, config
        # Colours take a second to import and a millisecond a picture.
        self.colours = Colours(config) if config.coloured or config.custom else None

    def __call__(self, entries: Rows, stream: Stream) -> tuple[Pixels, Rows]:
        """Read and change each."""
        boxes = uniforms((*stream, "crop"), entries, 2 * TRIES + 2)
        policy = uniforms((*stream, "policy"), entries, POLICY_DRAWS)
        down, across = moves(entries, stream, self.side, self.config)
        pictures, found = [], []
        for k, entry in enumerate(entries.tolist()):
            read, image = self.reader.readable(entry % len(self.reader.table))
            found.append(read)
            if self.config.own is not None:
                image = self._own(image, read, generator(*stream, "own", entry))
            view = moved(self._cropped(image, boxes[k]), down[k], across[k])
            if self.config.auto != "none":
                view = apply_policy(view, self.config.auto, policy[k])
            if self.colours is not None:
                view = self.colours(view, (*stream, entry))
            pictures.append(view)
        return np.stack(pictures), np.array(found, np.int64)

    def _own(self, image: Pixels, row: int, random: np.random.Generator) -> Pixels:
        table = self.reader.table
        assert self.config.own is not None
        classes = table.classes[table.rows(row)].astype(np.int64)
        return repainted(image, classes, self.config.own.value, random)

    def _cropped(self, image: Pixels, draws: NDArray[np.float64]) -> Pixels:
        if self.config.crop == 1:
            return centre(image, self.side)
        x, y, width, height = random_crop(image.shape[1], image.shape[0], self.config.crop, draws)
        return resized(image[y : y + height, x : x + width], self.side)


def random_crop(
    width: int, height: int, least: float, draws: NDArray[np.float64]
) -> tuple[int, int, int, int]:
    """Draw a crop of `least` to all of the area: x, y, width, height; the middle if none fits."""
    for share, shape in draws[2:].reshape(-1, 2):
        area = width * height * (least + (1 - least) * share)
        low, high = map(math.log, RATIO)
        ratio = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = draws[:2] * (width - w + 1, height - h + 1)
            return int(x), int(y), w, h
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side
