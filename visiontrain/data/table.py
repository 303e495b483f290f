"""Table: all labels of one split in flat arrays, whatever format they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.interfaces import ImageSource
from visiontrain.data.windows import Windows


@dataclass(frozen=True, slots=True)
class Defect:
    """One thing wrong with the data: named, counted, and left out."""

    file: str
    line: int | None  # 1-based line of the label file, None where there is none
    kind: str  # a key of data.defects.DEFECTS, e.g. "truncated-image"
    reason: str  # for people


@dataclass(frozen=True, slots=True)
class Table:
    """N images, K boxes. Flat arrays, so that loader processes share them copy-on-write.

    A class of a whole image is a box around all of it.
    """

    names: tuple[str, ...]  # class names; a box's class indexes this
    images: ImageSource  # N images; row i is image i
    sizes: NDArray[np.int32]  # (N, 2): width, height as shown (after EXIF rotation)
    offsets: NDArray[np.int64]  # (N + 1,): boxes of image i are offsets[i] : offsets[i + 1]
    boxes: NDArray[np.float32]  # (K, 4): x1, y1, x2, y2 in original pixels, inside the image
    classes: NDArray[np.int32]  # (K,)
    crowd: NDArray[np.bool_]  # (K,): a region of many (COCO): never trained on, ignored in scores
    difficult: NDArray[np.bool_]  # (K,): VOC's flag: never trained on, ignored in scores
    area: NDArray[np.float32]  # (K,): COCO's segment area where given, else the box's
    defects: Sequence[Defect] = field(default=())
    image_ids: NDArray[np.int64] | None = None  # (N,): a COCO JSON's own; None: the rows
    category_ids: NDArray[np.int64] | None = None  # (C,): likewise; None: the classes
    task: Literal["detect", "classify"] = "detect"  # what the labels say: boxes, or classes alone
    several: bool = False  # an image may have any number of classes
    windows: Windows | None = None  # of shards: which rows are read together

    def __len__(self) -> int:
        return len(self.sizes)

    def rows(self, image: int) -> slice:
        """Return which boxes belong to `image`."""
        return slice(int(self.offsets[image]), int(self.offsets[image + 1]))

    def chosen(self, rows: NDArray[np.int64], images: ImageSource) -> Self:
        """Return a table of `images` with the labels of `rows`, in any order."""
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        boxes = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], counts)
        ids = self.image_ids
        return replace(
            self,
            images=images,
            sizes=self.sizes[rows],
            offsets=offsets,
            boxes=self.boxes[boxes],
            classes=self.classes[boxes],
            crowd=self.crowd[boxes],
            difficult=self.difficult[boxes],
            area=self.area[boxes],
            image_ids=None if ids is None else ids[rows],
        )

    def digest(self) -> str:
        """Return what tells this table from another: a hash of classes, sizes, boxes and tars."""
        text = hashlib.sha256(repr(self.names).encode())
        arrays = [self.sizes, self.offsets, self.boxes, self.classes]
        if self.num_ignored:  # else as tables were told apart before these counted
            arrays += [self.crowd, self.difficult]
        if self.windows is not None:  # the order of epochs follows from how tars are cut
            arrays.append(self.windows.starts)
        for array in arrays:
            text.update(array.tobytes())
        return text.hexdigest()

    @property
    def num_ignored(self) -> int:
        """Return how many boxes are never trained on: crowd or difficult."""
        return int((self.crowd | self.difficult).sum())

    def targets(self, image: int) -> NDArray[np.float32]:
        """Return what `image` trains on (M, 6): class, x1, y1, x2, y2, weight 1."""
        rows = self.rows(image)
        keep = ~(self.crowd[rows] | self.difficult[rows])
        classes = self.classes[rows][keep, None].astype(np.float32)
        return np.hstack([classes, self.boxes[rows][keep], np.ones_like(classes)])
