"""COCO's greedy matching of detections to boxes at one overlap, without a loop over images.

K detections, G boxes of the truth, P pairs that overlap enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visiontrain.metrics.rows import BOX, CLASS, IMAGE_COLUMN, Rows, to_xywh

PAIRS_AT_ONCE = 2_000_000  # bounds memory: about 30 float64 arrays of this length
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Labels(Protocol):
    """What scores need of a `data.table.Table`: N images, G boxes."""

    @property
    def names(self) -> tuple[str, ...]:
        """Class names, in the order of their numbers."""
        ...

    @property
    def sizes(self) -> NDArray[np.int32]:
        """Width and height of each image (N, 2)."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Boxes of image i are offsets[i] : offsets[i + 1] (N + 1,)."""
        ...

    @property
    def boxes(self) -> NDArray[np.float32]:
        """Corners x1, y1, x2, y2 in original pixels (G, 4)."""
        ...

    @property
    def classes(self) -> NDArray[np.int32]:
        """Class of each box (G,)."""
        ...

    @property
    def crowd(self) -> NDArray[np.bool_]:
        """Whether a box holds many objects (G,)."""
        ...

    @property
    def difficult(self) -> NDArray[np.bool_]:
        """VOC's flag (G,)."""
        ...

    @property
    def area(self) -> NDArray[np.float32]:
        """What COCO's size ranges go by (G,)."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Truth:
    """The boxes of a table as the scores see them."""

    images: Ints  # (G,) row in the table
    classes: Ints  # (G,)
    boxes: Rows  # (G, 4): left, top, width, height
    area: Rows  # (G,): which of COCO's size ranges a box is in
    ignored: Flags  # (G,): neither a miss when not found, nor an error when found

    @classmethod
    def of(cls, table: Labels) -> Truth:
        """Read `table`. Crowd and difficult boxes are ignored alike, as COCO's `iscrowd`.

        COCO's evaluation overwrites an annotation's `ignore` by its `iscrowd`, so `iscrowd` is
        the one flag that every COCO tool honours. It takes any number of detections, with the
        overlap counted as a share of the detection: duplicates on a difficult box cost nothing,
        as in VOC's own evaluation.
        """
        return cls(
            images=np.repeat(np.arange(len(table)), np.diff(table.offsets)),
            classes=table.classes.astype(np.int64),
            boxes=to_xywh(table.boxes),
            area=table.area.astype(np.float64),
            ignored=table.crowd | table.difficult,
        )

    def counts(self, classes: int) -> Ints:
        """Return how many boxes of each class are to be found (classes,)."""
        return np.bincount(self.classes[~self.ignored], minlength=classes)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Detections and boxes of the same group whose overlap reaches a threshold."""

    detection: Ints  # (P,) ascending
    box: Ints  # (P,)
    overlap: Rows  # (P,) intersection over union, over the detection for ignored boxes


@dataclass(frozen=True, slots=True)
class Matches:
    """What became of each detection."""

    kept: Flags  # (K,): among the best `limit` of its image and class
    box: Ints  # (K,): the box it found, -1 for none

    def correct(self, truth: Truth) -> Flags:
        """Say which detections (K,) found a box."""
        return self.kept & (self.box >= 0) & ~self._ignored(truth)

    def counted(self, truth: Truth) -> Flags:
        """Say which detections (K,) are right or wrong, rather than ignored."""
        return self.kept & ~self._ignored(truth)

    def _ignored(self, truth: Truth) -> Flags:
        result = np.zeros(len(self.box), np.bool_)
        result[self.box >= 0] = truth.ignored[self.box[self.box >= 0]]
        return result


def match(rows: Rows, truth: Truth, overlap: float, limit: int = 100) -> Matches:
    """Match each image's detections of each class, best first, as pycocotools does.

    A detection takes the free box it overlaps most, an ignored one only where no other reaches
    `overlap`; of equal overlaps the last box wins. Ignored boxes are never used up.

    Args:
        rows: detections (K, 7), canonical.
        truth: the boxes to find.
        overlap: least intersection over union.
        limit: detections taken of an image and class, best first.
    """
    classes = int(max(rows[:, CLASS].max(initial=0), truth.classes.max(initial=0))) + 1
    group = (rows[:, IMAGE_COLUMN] * classes + rows[:, CLASS]).astype(np.int64)
    place = places(group)
    kept = place < limit
    found = pairs(rows, group, truth, truth.images * classes + truth.classes, overlap)
    box = np.full(len(rows), -1, np.int64)
    taken = np.zeros(len(truth.boxes), np.bool_)
    turn = place[found.detection]
    order = np.argsort(turn, kind="stable")
    ends = np.searchsorted(turn[order], np.arange(1, min(limit, turn.max(initial=-1) + 1) + 1))
    start = 0
    for end in ends:  # the n-th detection of every image and class at once
        _take(found, order[start:end], truth, box, taken)
        start = end
    return Matches(kept, box)


def _take(found: Pairs, now: Ints, truth: Truth, box: Ints, taken: Flags) -> None:
    """Give each detection among the pairs `now` its best free box; writes `box` and `taken`."""
    now = now[~taken[found.box[now]]]
    keys = (found.box[now], found.overlap[now], ~truth.ignored[found.box[now]])
    now = now[np.lexsort((*keys, found.detection[now]))]  # each detection's best pair is its last
    last = np.append(found.detection[now][1:] != found.detection[now][:-1], values=True)
    best = now[last[: len(now)]]
    box[found.detection[best]] = found.box[best]
    taken[found.box[best]] = ~truth.ignored[found.box[best]]


def places(group: Ints) -> Ints:
    """Return each entry's place among those of its group (K,), in the order given, from 0."""
    order = np.argsort(group, kind="stable")
    _, starts, counts = np.unique(group[order], return_index=True, return_counts=True)
    result = np.empty(len(group), np.int64)
    result[order] = np.arange(len(group)) - np.repeat(starts, counts)
    return result


def pairs(rows: Rows, row_groups: Ints, truth: Truth, truth_groups: Ints, overlap: float) -> Pairs:
    """Find the pairs of detections and boxes in one group that overlap by `overlap` or more."""
    order = np.argsort(truth_groups, kind="stable")
    first = np.searchsorted(truth_groups[order], row_groups, side="left")
    counts = np.searchsorted(truth_groups[order], row_groups, side="right") - first
    boxes = to_xywh(rows[:, BOX])
    parts = []
    for start, end in _chunks(counts):
        detection = np.repeat(np.arange(start, end), counts[start:end])
        inside = np.arange(len(detection)) - np.repeat(
            np.cumsum(counts[start:end]) - counts[start:end], counts[start:end]
        )
        box = order[first[detection] + inside]
        shared = overlaps(boxes[detection], truth.boxes[box], truth.ignored[box])
        near = shared >= min(overlap, 1 - 1e-10)  # pycocotools' own guard
        parts.append((detection[near], box[near], shared[near]))
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
    return Pairs(*(np.concatenate(columns) for columns in zip(empty, *parts, strict=True)))


def _chunks(counts: Ints) -> Iterator[tuple[int, int]]:
    """Cut detections with `counts` pairs each where PAIRS_AT_ONCE is reached."""
    total = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = total[start - 1] if start else 0
        end = int(np.searchsorted(total, before + PAIRS_AT_ONCE, side="right"))
        end = max(end, start + 1)
        yield start, end
        start = end


def overlaps(found: Rows, boxes: Rows, ignored: Flags) -> Rows:
    """Return the overlaps (P,) of `found` and `boxes` (P, 4), each left, top, width, height.

    The arithmetic of pycocotools' `bbIou`, to the bit: intersection over union, and over the
    detection's area where `ignored`. Two boxes without area overlap by 0.
    """
    corner = np.minimum(found[:, :2] + found[:, 2:], boxes[:, :2] + boxes[:, 2:])
    sides = np.maximum(corner - np.maximum(found[:, :2], boxes[:, :2]), 0)
    inside = sides[:, 0] * sides[:, 1]
    own, other = found[:, 2] * found[:, 3], boxes[:, 2] * boxes[:, 3]
    union = np.where(ignored, own, own + other - inside)
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)
