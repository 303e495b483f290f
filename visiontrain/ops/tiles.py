"""Large images cut into overlapping tiles, and detections of tiles put together again.

T tiles, K detections; boxes and tiles are x1, y1, x2, y2 in pixels of the whole image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SAME = 0.5  # overlap from which two detections are one object, where both tiles look
EDGE = 2.0  # pixels from a tile's border within which a box counts as cut by it


@dataclass(frozen=True, slots=True)
class Tiling:
    """How images are cut."""

    side: int  # of a tile, pixels
    overlap: int  # of neighbours, at least; pixels

    @classmethod
    def of(cls, side: int, share: float) -> Tiling:
        """Take the overlap as a share of the side."""
        return cls(side, min(side - 1, round(side * share)))

    def rects(self, width: int, height: int) -> NDArray[np.int64]:
        """Return the tiles of an image (T, 4), row by row; they cover it, and never pass it."""
        columns, lines = self._spans(width), self._spans(height)
        return np.array([[x1, y1, x2, y2] for y1, y2 in lines for x1, x2 in columns], np.int64)

    def _spans(self, length: int) -> list[tuple[int, int]]:
        """Return where tiles begin and end along a side: evenly spread."""
        if length <= self.side:
            return [(0, length)]
        gaps = math.ceil((length - self.side) / (self.side - self.overlap))
        starts = [number * (length - self.side) // gaps for number in range(gaps + 1)]
        return [(start, start + self.side) for start in starts]


def merge(
    boxes: Floats, scores: Floats, classes: Floats, tile: NDArray[np.int64], rects: Floats
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Put the detections of one image's tiles together.

    Two detections of one class in two tiles are one object when they agree on the ground that
    both tiles see. Of a group the likeliest box that no tile cuts is taken; where all are cut,
    what they cover together. So what overlapping tiles see exactly comes out exactly.

    Args:
        boxes: (K, 4).
        scores: (K,).
        classes: (K,).
        tile: (K,) the tile of each.
        rects: (T, 4) the tiles, as `Tiling.rects` lists them.

    Returns:
        boxes (G, 4), scores (G,), and for each the number of its likeliest detection (G,).
    """
    group = np.arange(len(boxes))
    cut = _cut(boxes, rects[tile], rects)
    for one, other in _matches(boxes, scores, classes, tile, rects):
        low, high = sorted((_root(group, one), _root(group, other)))
        group[high] = low
    roots = np.array([_root(group, k) for k in range(len(boxes))], np.int64)
    order = np.lexsort((np.arange(len(boxes)), -scores, cut, roots))  # whole ones first
    first = np.unique(roots[order], return_index=True)[1]
    chosen = order[first]
    best = np.maximum.reduceat(scores[order], first) if len(order) else scores[order]
    merged = boxes[chosen]
    if len(order):
        covered = np.hstack(
            [
                np.minimum.reduceat(boxes[order, :2], first),
                np.maximum.reduceat(boxes[order, 2:], first),
            ]
        )
        merged = np.where(cut[chosen, None], covered, merged)
    return merged, best, chosen


def _root(group: NDArray[np.int64], member: int) -> int:
    while group[member] != member:
        member = int(group[member])
    return int(member)


def _cut(boxes: Floats, own: Floats, rects: Floats) -> NDArray[np.bool_]:
    """Tell which boxes (K, 4) touch a border of their tile that is not the image's."""
    low, high = rects[:, :2].min(axis=0), rects[:, 2:].max(axis=0)
    before = (boxes[:, :2] <= own[:, :2] + EDGE) & (own[:, :2] > low)
    after = (boxes[:, 2:] >= own[:, 2:] - EDGE) & (own[:, 2:] < high)
    return (before | after).any(axis=1)


def _matches(
    boxes: Floats, scores: Floats, classes: Floats, tile: NDArray[np.int64], rects: Floats
) -> Iterator[tuple[int, int]]:
    """Yield pairs of detections that are one object; one of a tile matches one of another's."""
    members = [np.flatnonzero(tile == t) for t in range(len(rects))]
    for a, b in _neighbours(rects):
        mine, theirs = members[a], members[b]
        common = _within(rects[a], rects[b][None])[0]
        overlaps = _overlaps(_within(common, boxes[mine]), _within(common, boxes[theirs]))
        overlaps[classes[mine][:, None] != classes[theirs][None]] = 0
        sure = np.minimum(scores[mine][:, None], scores[theirs][None])
        yield from ((int(mine[i]), int(theirs[j])) for i, j in _pairs(overlaps, sure))


def _neighbours(rects: Floats) -> Iterator[tuple[int, int]]:
    """Yield tiles side by side and one above the other; what two others share, these share, too."""
    columns = int((rects[:, 1] == rects[0, 1]).sum())
    for tile in range(len(rects)):
        if (tile + 1) % columns:
            yield tile, tile + 1
        if tile + columns < len(rects):
            yield tile, tile + columns


def _pairs(overlaps: Floats, sure: Floats) -> Iterator[tuple[int, int]]:
    """Yield rows and columns that match, each once: the surest pairs first, then the nearest.

    Else a faint detection beside a likely one would take its partner away.
    """
    rows, columns = np.nonzero(overlaps >= SAME)
    free_rows, free_columns = set(rows.tolist()), set(columns.tolist())
    for k in np.lexsort((-overlaps[rows, columns], -sure[rows, columns])):
        i, j = int(rows[k]), int(columns[k])
        if i in free_rows and j in free_columns:
            free_rows.discard(i)
            free_columns.discard(j)
            yield i, j


def _within(area: Floats, boxes: Floats) -> Floats:
    """Return what of `boxes` (N, 4) lies in `area` (4,); empty ones have no extent."""
    low, high = np.tile(area[:2], 2), np.tile(area[2:], 2)
    return np.clip(boxes, low, high)


def _overlaps(a: Floats, b: Floats) -> Floats:
    """Return intersection over union of boxes (N, 4) and (M, 4): (N, M); 0 of empty ones."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def merge_rows(
    rows: Floats, owner: NDArray[np.int64], rects: Floats, most: int | None = None
) -> Floats:
    """Put detections of the tiles of many images together, those of an image best first.

    Args:
        rows: (K, 7): tile, box in pixels of the tile, score, class.
        owner: (T,) the image of each tile, ascending.
        rects: (T, 4) the tiles.
        most: detections kept of an image; default: all.

    Returns:
        (G, 7): image, box in pixels of the image, score, class.
    """
    if not len(rows):
        return rows
    rows = rows[np.lexsort(rows.T[::-1])]  # in whatever order ranks gave them
    tile = rows[:, 0].astype(np.int64)
    boxes = rows[:, 1:5] + np.tile(rects[tile, :2], 2)
    images, starts = np.unique(owner[tile], return_index=True)  # ascending, as tiles are
    ends = [*starts[1:], len(rows)]
    merged = []
    for image, start, end in zip(images.tolist(), starts.tolist(), ends, strict=True):
        first, last = np.searchsorted(owner, [image, image + 1]).tolist()
        here, own = slice(start, end), rects[first:last]
        found, scores, chosen = merge(
            boxes[here], rows[here, 5], rows[here, 6], tile[here] - first, own
        )
        best = np.argsort(-scores, kind="stable")[:most]
        classes = rows[here, 6][chosen]
        table = np.column_stack([np.full(len(found), image), found, scores, classes])
        merged.append(table[best])
    return np.concatenate(merged)
