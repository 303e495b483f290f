"""From what tars were found to hold to a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.data.build import Boxes, Judge, arrays, assemble, whole_images
from visiontrain.data.description import Description, unique_names
from visiontrain.data.images import Paths
from visiontrain.data.remote import ShardStore
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.table import Defect, Table
from visiontrain.data.tar_scan import WHOLE, TarScan

MOST_CLASSES = 100_000  # that a split without names may number


@dataclass(slots=True)
class Assembly:
    """Tars of one split that were read through, to be put into one table."""

    tars: Sequence[str]
    scans: Sequence[TarScan]
    names: Sequence[str] | None  # None: to be found in the labels
    store: ShardStore
    description: Description
    defects: list[Defect] = field(default_factory=list)

    def table(self) -> Table:
        """Return the table; everything wrong is among its defects."""
        boxed = any(scan.boxed for scan in self.scans)
        self.defects += [defect for scan in self.scans for defect in scan.defects]
        self._note_pickled()
        names = tuple(self.names or self._names())
        images, boxes = self._images(), self._boxes(names)
        sizes = np.array([s for scan in self.scans for s in scan.sizes], np.int32).reshape(-1, 2)
        if boxed:
            usable = self._usable(images, boxes)
            judge = Judge(names, images.name, single_cls=self.description.single_cls)
            table = assemble(images, sizes, usable, boxes, judge, self.defects)
            return self._with_ids(table, usable)
        return self._labelled(names, images, sizes, boxes)

    def _labelled(
        self,
        names: Sequence[str],
        images: ShardImages,
        sizes: NDArray[np.int32],
        boxes: Boxes,
    ) -> Table:
        said = self.description.values.get("several")
        if said is not None and not isinstance(said, bool):
            raise self.description.fail("several", f"got {said!r}", "give true or false")
        several = any(scan.listed for scan in self.scans) if said is None else said
        known = (boxes.label >= 0) & (boxes.label < len(names))
        for row in np.flatnonzero(~known):
            self._strange(images.name(int(boxes.image[row])), str(boxes.label[row]), names)
        boxes = boxes.keep(known)
        counts = np.bincount(boxes.image, minlength=len(images))
        usable = np.full(len(images), fill_value=True) if several else counts == 1
        for row in np.flatnonzero(~usable & (counts > 1)):
            reason = f"{counts[row]} classes, where others have one"
            self.defects.append(Defect(images.name(int(row)), None, "malformed-row", reason))
        rows = np.flatnonzero(usable)
        return whole_images(
            names,
            images.select(rows),
            sizes[rows],
            boxes.label[usable[boxes.image]],
            counts[usable],
            tuple(self.defects),
            several=several,
        )

    def _names(self) -> tuple[str, ...]:
        """Name the classes: by their texts, sorted, or by number."""
        tokens = {token for scan in self.scans for token in scan.tokens}
        texts = sorted(token for token in tokens if isinstance(token, str))
        numbers = [token for token in tokens if isinstance(token, int)]
        where = self.description.where
        if texts and numbers:
            raise DataError(
                f"{where}: labels are names ({texts[0]!r}) and numbers ({numbers[0]}); say what "
                "the numbers are with names: in the data set's YAML"
            )
        if len(texts) > MOST_CLASSES:
            raise DataError(
                f"{where}: {len(texts):,} names, such as {texts[0]!r:.40}; list the classes with "
                "names:"
            )
        if not numbers:
            return unique_names(texts, where) if texts else ("class0",)
        if max(numbers) >= MOST_CLASSES:
            raise DataError(f"{where}: a class {max(numbers)}; name the classes with names:")
        return tuple(f"class{number}" for number in range(max(numbers) + 1))

    def _images(self) -> ShardImages:
        counts = [len(scan.offsets) for scan in self.scans]
        return ShardImages(
            tars=tuple(self.tars),
            tar_sizes=np.array([scan.size for scan in self.scans], np.int64),
            starts=np.cumsum([0, *counts], dtype=np.int64),
            offsets=np.array([k for scan in self.scans for k in scan.offsets], np.int64),
            lengths=np.array([k for scan in self.scans for k in scan.lengths], np.int64),
            members=Paths(name for scan in self.scans for name in scan.members),
            store=self.store,
            max_pixels=self.description.max_pixels,
        )

    def _boxes(self, names: Sequence[str]) -> Boxes:
        """Return the boxes of all tars; a class of an unknown name becomes -1, and a defect."""
        number = {name: label for label, name in enumerate(names)}
        parts, start = [], 0
        for tar, scan in zip(self.tars, self.scans, strict=True):
            labels = arrays(scan.labels)
            for token, owner in zip(scan.tokens, labels.image.tolist(), strict=True):
                if isinstance(token, str) and token not in number:
                    self._strange(f"{tar}/{scan.members[owner]}", repr(token), names)
            own = [number.get(t, -1) if isinstance(t, str) else t for t in scan.tokens]
            shifted = labels.image + start
            parts.append(replace(labels, image=shifted, label=np.array(own, np.int64)))
            start += len(scan.members)
        columns = zip(*(tuple(getattr(p, n) for n in Boxes.__slots__) for p in parts), strict=True)
        whole = Boxes(*(np.concatenate(column) for column in columns))
        unknown = [isinstance(t, str) and t not in number for s in self.scans for t in s.tokens]
        return whole.keep(~np.array(unknown, np.bool_))

    def _strange(self, where: str, token: str, names: Sequence[str]) -> None:
        listed = ", ".join(names[:20])
        self.defects.append(
            Defect(where, None, "class-range", f"class {token} is none of {listed}")
        )

    def _usable(self, images: ShardImages, boxes: Boxes) -> NDArray[np.bool_]:
        """Leave out images that have a class alone where others have boxes."""
        usable = np.full(len(images), fill_value=True)
        for row in np.unique(boxes.image[(boxes.box == WHOLE).all(axis=1)]).tolist():
            usable[row] = False
            reason = "a class without a box, where other samples have boxes"
            self.defects.append(Defect(images.name(row), None, "unreadable-labels", reason))
        return usable

    def _with_ids(self, table: Table, usable: NDArray[np.bool_]) -> Table:
        ids = np.array([number for scan in self.scans for number in scan.ids], np.int64)[usable]
        given = len(ids) > 0 and ids.min() >= 0 and len(np.unique(ids)) == len(ids)
        return replace(table, image_ids=ids) if given else table

    def _note_pickled(self) -> None:
        found = sum((scan.pickled for scan in self.scans), Counter())
        if found:
            listed = ", ".join(f"{count:,} .{suffix}" for suffix, count in sorted(found.items()))
            reason = f"{listed}: never decoded, they could run code"
            self.defects.append(Defect(self.tars[0], None, "pickled-member", reason))


def without_repeats(table: Table) -> Table:
    """Return a table of boxes that are to be of one class: one place may have had two."""
    boxes = Boxes(
        image=np.repeat(np.arange(len(table)), np.diff(table.offsets)),
        line=np.zeros(len(table.boxes), np.int64),
        box=table.boxes.astype(np.float64),
        label=table.classes.astype(np.int64),
        crowd=table.crowd,
        difficult=table.difficult,
        area=table.area.astype(np.float64),
    )
    images = cast("ShardImages", table.images)
    judge = Judge(table.names, images.name, single_cls=True)
    usable = np.full(len(table), fill_value=True)
    judged = assemble(images, table.sizes, usable, boxes, judge, table.defects)
    return replace(judged, image_ids=table.image_ids)
