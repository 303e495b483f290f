"""Look at all of a data set before training on it: what `visiontrain check` prints."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np

from visiontrain.core.errors import DataError
from visiontrain.core.interfaces import ImageSource
from visiontrain.data import images
from visiontrain.data.defects import DEFECTS, counted, describe, fatal, printable
from visiontrain.data.header import ImageError, read_header
from visiontrain.data.images import FileImages
from visiontrain.data.open import DataSpec
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.table import Defect, Table

EXAMPLES = 3  # defects of one kind shown to people
THREADS = 8
NEEDED = ("train", "val")  # splits, by a run
BACKGROUND = 0.5  # share of images without a box from which it is worth a word


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What one split holds."""

    split: str
    images: int = 0  # usable
    boxes: int = 0
    ignored: int = 0  # of the boxes: crowd or difficult, never trained on
    backgrounds: int = 0  # images without a box
    rotated: int = 0  # images that EXIF turns
    classes: dict[str, int] = field(default_factory=dict)  # name -> boxes
    noun: str = "box"  # what `boxes` counts: labels of whole images, too
    sizes: dict[str, int] = field(default_factory=dict)  # "640x480" -> images, most frequent first
    defects: tuple[Defect, ...] = ()
    problem: str | None = None  # why it cannot be read at all

    @property
    def usable(self) -> bool:
        """Tell whether a run could train on it, or score it."""
        enough = self.boxes > (self.ignored if self.split == "train" else 0)
        return enough and fatal(self.defects, strict=False) is None

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold, under the names of the fields."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        defects = [
            {"file": defect.file, "line": defect.line, "kind": defect.kind, "reason": defect.reason}
            for defect in self.defects
        ]
        return fields | {"defects": defects}


@dataclass(frozen=True, slots=True)
class Report:
    """What a data set holds, and what is wrong with it."""

    source: str
    format: str
    names: tuple[str, ...]
    notes: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    missing: tuple[tuple[str, str], ...] = ()  # splits that a run needs, and how to add each

    @property
    def trainable(self) -> bool:
        """Tell whether a run would start on it: on train, scored by val."""
        return set(NEEDED) <= {split.split for split in self.splits if split.usable}

    def lines(self) -> list[str]:
        """Return the report for people."""
        classes = counted(len(self.names), "class")
        lines = [f"{self.source}: {self.format}, {classes}", *self.notes]
        for split in self.splits:
            lines += _split_lines(split)
        lines += [
            f"{split}: no such split, and a run needs it; {how}" for split, how in self.missing
        ]
        return [printable(line) for line in lines]

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "source": self.source,
            "format": self.format,
            "names": list(self.names),
            "notes": list(self.notes),
            "trainable": self.trainable,
            "splits": {split.split: split.as_json() for split in self.splits},
        }


@dataclass(frozen=True, slots=True)
class Look:
    """What reading one image whole says."""

    digest: bytes  # of the file, or of the pixels where there is none; empty when unreadable
    rotated: bool = False
    defect: Defect | None = None


def check(spec: DataSpec, splits: Sequence[str], *, decode: bool = True) -> Report:
    """Read every label and image of `splits`; nothing that is wrong with them raises.

    Args:
        spec: The data set.
        splits: Which splits; the same picture in two of them is a defect of the later one.
        decode: Also decode the images, which finds truncated and hollow ones.
    """
    seen: dict[bytes, str] = {}
    reports = []
    for split in splits:
        try:
            table = spec.read(split)
        except DataError as error:
            reports.append(SplitReport(split, problem=str(error)))
        else:
            reports.append(_check_split(split, table, seen, decode=decode))
    missing = [(split, spec.how_to_add(split)) for split in NEEDED if split not in spec.splits]
    about = (spec.source, spec.format, spec.names, spec.notes)
    return Report(*about, tuple(reports), tuple(missing))


def _check_split(split: str, table: Table, seen: dict[bytes, str], *, decode: bool) -> SplitReport:
    look = partial(_look, table.images, decode=decode)
    with ThreadPoolExecutor(THREADS) as pool:
        looks = list(pool.map(look, range(len(table))))
    damaged = [item.defect for item in looks if item.defect is not None]
    repeated = [
        Defect(table.images.name(row), None, "duplicate-image", f"the same as {seen[item.digest]}")
        for row, item in enumerate(looks)
        if item.digest in seen
    ]
    for row, item in enumerate(looks):
        if item.digest:
            seen.setdefault(item.digest, f"{table.images.name(row)} in {split}")
    counts = np.bincount(table.classes, minlength=len(table.names)).tolist()
    sizes = Counter(f"{width}x{height}" for width, height in table.sizes.tolist())
    return SplitReport(
        split=split,
        images=len(table) - sum(DEFECTS[item.kind][0] == "image dropped" for item in damaged),
        boxes=len(table.boxes),
        ignored=table.num_ignored,
        backgrounds=int((np.diff(table.offsets) == 0).sum()),
        rotated=sum(item.rotated for item in looks),
        classes=dict(zip(table.names, counts, strict=True)),
        noun="box" if table.task == "detect" else "label",
        sizes=dict(sizes.most_common()),
        defects=(*table.defects, *damaged, *repeated),
    )


def _look(source: ImageSource, row: int, *, decode: bool) -> Look:
    """Read image `row` whole."""
    name = source.name(row)
    if not isinstance(source, FileImages | ShardImages):
        return Look(blake2b(source.read(row).tobytes(), digest_size=16).digest())
    try:
        data = source.read_bytes(row)
        digest = blake2b(data, digest_size=16).digest()
        head = read_header(io.BytesIO(data), name, source.max_pixels)
        if decode:
            images.decode(data, name, source.max_pixels)
    except ImageError as error:
        return Look(b"", defect=Defect(name, None, error.kind, error.reason))
    defect = None
    if decode and head.format == "jpeg" and images.is_hollow(data):
        defect = Defect(name, None, "hollow-image", DEFECTS["hollow-image"][1])
    return Look(digest, head.orientation != 1, defect)


def _split_lines(split: SplitReport) -> list[str]:
    if split.problem is not None:
        return [f"{split.split}: not read: {split.problem}"]
    ignored = f" ({split.ignored} crowd or difficult)" if split.ignored else ""
    held = f"{counted(split.images, 'image')}, {counted(split.boxes, split.noun)}{ignored}"
    without = f"{counted(split.backgrounds, 'image')} without a {split.noun}"
    lines = [f"{split.split}: {held}, {without}, {split.rotated} turned by EXIF"]
    lines.append("  classes: " + ", ".join(f"{name} {n:,}" for name, n in split.classes.items()))
    common = list(split.sizes.items())[:EXAMPLES]
    more = f" and {len(split.sizes) - EXAMPLES} more" if len(split.sizes) > EXAMPLES else ""
    lines.append("  sizes: " + ", ".join(f"{size} ({n:,})" for size, n in common) + more)
    if split.images and split.backgrounds > BACKGROUND * split.images:
        lines.append(
            f"  more than half of the images have no {split.noun}: are the labels where they "
            "belong?"
        )
    return [*lines, *_defect_lines(split.defects)]


def _defect_lines(defects: Sequence[Defect]) -> list[str]:
    """Count each kind, with a few examples."""
    lines = []
    for kind, count in Counter(defect.kind for defect in defects).most_common():
        what, meaning = DEFECTS[kind]
        done = "" if what == "none" else f" ({what})"
        lines.append(f"  {count} {kind}{done}: {meaning}")
        shown = [defect for defect in defects if defect.kind == kind][:EXAMPLES]
        lines += [f"    {describe(defect)}" for defect in shown]
        if count > EXAMPLES:
            lines.append(f"    ... and {count - EXAMPLES} more; --json lists all")
    return lines
