"""From raw boxes of any format to a table: judged, clipped, counted, in flat arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.interfaces import ImageSource
from visiontrain.data.images import StoredImages
from visiontrain.data.scan import Scan
from visiontrain.data.table import Defect, Table

LARGEST = 1e12  # area that is believed, pixels
MIXERS = np.array([3**33, 5**23, 7**19, 11**17, 13**15, 17**13], np.uint64)  # odd
TOLERANCE = 0.01  # share of a side by which a box may pass the border without a word


@dataclass(slots=True)
class Labels:
    """Raw boxes of one split while they are read, one list entry per box."""

    image: list[int] = field(default_factory=list)  # row of the path it belongs to
    line: list[int] = field(default_factory=list)  # of the label file, 1-based; 0 for none
    box: list[tuple[float, float, float, float]] = field(default_factory=list)  # xyxy, pixels
    label: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    area: list[float] = field(default_factory=list)  # NaN: the box's
    dropped: set[int] = field(default_factory=set)  # images whose labels cannot be read
    defects: list[Defect] = field(default_factory=list)

    def add(  # noqa: PLR0913 - one box is this many facts
        self,
        image: int,
        label: int,
        box: tuple[float, float, float, float],
        *,
        line: int = 0,
        crowd: bool = False,
        difficult: bool = False,
        area: float = np.nan,
    ) -> None:
        """Append one box."""
        self.image.append(image)
        self.line.append(line)
        self.box.append(box)
        self.label.append(label)
        self.crowd.append(crowd)
        self.difficult.append(difficult)
        self.area.append(area)


@dataclass(frozen=True, slots=True)
class Boxes:
    """K raw boxes as arrays."""

    image: NDArray[np.int64]  # (K,)
    line: NDArray[np.int64]  # (K,)
    box: NDArray[np.float64]  # (K, 4): x1, y1, x2, y2
    label: NDArray[np.int64]  # (K,)
    crowd: NDArray[np.bool_]  # (K,)
    difficult: NDArray[np.bool_]  # (K,)
    area: NDArray[np.float64]  # (K,)

    def keep(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> Boxes:
        """Return the boxes chosen by a mask or by rows."""
        return Boxes(*(getattr(self, name)[mask] for name in self.__slots__))


def arrays(labels: Labels) -> Boxes:
    """Return the boxes of `labels`, in the order of their images."""
    boxes = Boxes(
        image=np.array(labels.image, np.int64),
        line=np.array(labels.line, np.int64),
        box=np.array(labels.box, np.float64).reshape(-1, 4),
        label=np.array(labels.label, np.int64),
        crowd=np.array(labels.crowd, np.bool_),
        difficult=np.array(labels.difficult, np.bool_),
        area=np.array(labels.area, np.float64),
    )
    return boxes.keep(np.argsort(boxes.image, kind="stable"))


class Judge:
    """Takes out the boxes that cannot be used, and writes down each with its reason."""

    def __init__(
        self, names: Sequence[str], label_file: Callable[[int], str], *, single_cls: bool
    ) -> None:
        self.names = names
        self.label_file = label_file
        self.single_cls = single_cls
        self.defects: list[Defect] = []

    def __call__(self, boxes: Boxes, sizes: NDArray[np.int32]) -> Boxes:
        """Return the usable boxes, clipped to their images (N, 2)."""
        boxes = self._drop(
            boxes, (boxes.label < 0) | (boxes.label >= len(self.names)), "class-range", self._class
        )
        if self.single_cls:  # before duplicates are looked for: one place may have two classes
            boxes = replace(boxes, label=np.zeros_like(boxes.label))
        broken = np.any(~np.isfinite(boxes.box), axis=1)
        boxes = self._drop(boxes, broken, "nonfinite-box", _box)
        negative = np.any(boxes.box[:, 2:] < boxes.box[:, :2], axis=1)
        boxes = self._drop(boxes, negative, "negative-box", _box)
        limits = np.tile(sizes[boxes.image], 2).astype(np.float64)
        clipped = np.clip(boxes.box, 0, limits)
        far = np.any(np.abs(clipped - boxes.box) > TOLERANCE * limits, axis=1)
        single = clipped.astype(np.float32)
        empty = np.any(single[:, 2:] <= single[:, :2], axis=1)
        self._note(boxes, far & ~empty, "box-outside", _box)
        self._note(boxes, empty, "empty-box", _box)
        return self._unique(replace(boxes, box=clipped).keep(~empty))

    def _unique(self, boxes: Boxes) -> Boxes:
        """Drop what repeats a box and class of the same image: the first that counts stays."""
        keys = np.column_stack([boxes.image, boxes.label, boxes.box]) + 0.0  # -0.0 becomes 0.0
        hashed = (keys.view(np.uint64) * MIXERS).sum(axis=1)  # wraps; ten times np.unique(axis=0)
        order = np.argsort(boxes.crowd | boxes.difficult, kind="stable")
        _, first, which = np.unique(hashed[order], return_index=True, return_inverse=True)
        kept = np.empty_like(order)
        kept[order] = order[first[which]]
        again = (kept != np.arange(len(keys))) & np.all(keys == keys[kept], axis=1)
        return self._drop(boxes, again, "duplicate-box", _box)

    def _drop(
        self, boxes: Boxes, bad: NDArray[np.bool_], kind: str, reason: Callable[[Boxes, int], str]
    ) -> Boxes:
        self._note(boxes, bad, kind, reason)
        return boxes.keep(~bad)

    def _note(
        self, boxes: Boxes, bad: NDArray[np.bool_], kind: str, reason: Callable[[Boxes, int], str]
    ) -> None:
        for row in np.flatnonzero(bad):
            file = self.label_file(int(boxes.image[row]))
            self.defects.append(
                Defect(file, int(boxes.line[row]) or None, kind, reason(boxes, int(row)))
            )

    def _class(self, boxes: Boxes, row: int) -> str:
        listed = ", ".join(f"{i} {name}" for i, name in enumerate(self.names[:20]))
        more = ", ..." if len(self.names) > 20 else ""
        return f"class {boxes.label[row]} is none of {listed}{more}"


def _box(boxes: Boxes, row: int) -> str:
    """Say where a box is, in pixels."""
    return "x1 {:.6g}, y1 {:.6g}, x2 {:.6g}, y2 {:.6g}".format(*boxes.box[row])


def build(
    names: Sequence[str],
    images: StoredImages,
    seen: Scan,
    labels: Labels,
    label_file: Callable[[int], str],
    *,
    single_cls: bool = False,
) -> Table:
    """Put the usable images and boxes into a table; everything else is among its defects."""
    judge = Judge(names, label_file, single_cls=single_cls)
    usable = seen.usable.copy()
    usable[list(labels.dropped)] = False
    defects = (*seen.defects, *labels.defects)
    return assemble(images, seen.sizes, usable, arrays(labels), judge, defects)


def assemble(
    images: StoredImages,
    sizes: NDArray[np.int32],
    usable: NDArray[np.bool_],
    boxes: Boxes,
    judge: Judge,
    defects: Sequence[Defect] = (),
) -> Table:
    """Put images and boxes, in the order of their images, into a table.

    Args:
        images: all that are listed (N).
        sizes: of each (N, 2).
        usable: which of them can be used (N,).
        boxes: of all images.
        judge: says which boxes can be used.
        defects: that were found before.
    """
    boxes = judge(boxes.keep(usable[boxes.image]), sizes)
    rows = np.flatnonzero(usable)
    numbers = np.cumsum(usable) - 1  # of the rows that stay
    return table_of(
        judge.names,
        images.select(rows),
        sizes[rows],
        replace(boxes, image=numbers[boxes.image]),
        (*defects, *judge.defects),
    )


def table_of(
    names: Sequence[str],
    images: ImageSource,
    sizes: NDArray[np.int32],
    boxes: Boxes,
    defects: Sequence[Defect] = (),
) -> Table:
    """Make a table of images of `sizes` (N, 2) and judged boxes, in the order of the images."""
    counts = np.bincount(boxes.image, minlength=len(sizes))
    own = np.prod(boxes.box[:, 2:] - boxes.box[:, :2], axis=1)
    plausible = (boxes.area >= 0) & (boxes.area <= LARGEST)  # also: not NaN
    return Table(
        names=tuple(names),
        images=images,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes.box.astype(np.float32),
        classes=boxes.label.astype(np.int32),
        crowd=boxes.crowd,
        difficult=boxes.difficult,
        area=np.where(plausible, boxes.area, own).astype(np.float32),
        defects=tuple(defects),
    )


def build_labelled(  # noqa: PLR0913 - what a reader found
    names: Sequence[str],
    images: StoredImages,
    seen: Scan,
    labels: Sequence[tuple[int, int]],
    dropped: Collection[int] = (),
    defects: Sequence[Defect] = (),
    *,
    several: bool = False,
) -> Table:
    """Put images and the classes of each into a table.

    Args:
        names: the classes.
        images: all that are listed.
        seen: what their headers say.
        labels: (row of an image, class), in the order of the images.
        dropped: rows of images that cannot be used.
        defects: why.
        several: an image may have any number of classes.
    """
    usable = seen.usable.copy()
    usable[list(dropped)] = False
    rows = np.flatnonzero(usable)
    owner, label = np.array(labels, np.int64).reshape(-1, 2).T
    kept = usable[owner]
    return whole_images(
        names,
        images.select(rows),
        seen.sizes[rows],
        label[kept],
        np.bincount(owner[kept], minlength=len(usable))[usable],
        (*seen.defects, *defects),
        several=several,
    )


def whole_images(  # noqa: PLR0913 - a table is this many columns
    names: Sequence[str],
    images: ImageSource,
    sizes: NDArray[np.int32],
    classes: NDArray[np.integer],
    counts: NDArray[np.integer],
    defects: Sequence[Defect] = (),
    *,
    several: bool = False,
) -> Table:
    """Make a table of labelled images: `counts` (N,) of `classes` (K,) belong to each."""
    ends = np.repeat(sizes, counts, axis=0).astype(np.float32)
    return Table(
        names=tuple(names),
        images=images,
        sizes=sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.hstack([np.zeros_like(ends), ends]),
        classes=classes.astype(np.int32),
        crowd=np.zeros(len(classes), np.bool_),
        difficult=np.zeros(len(classes), np.bool_),
        area=np.prod(ends, axis=1),
        defects=defects,
        task="classify",
        several=several,
    )
