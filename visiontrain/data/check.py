"""Look at all of a data set before training on it: what `visiontrain check` prints."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np

from visiontrain.core.interfaces import ImageSource
from visiontrain.data import images
from visiontrain.data.defects import DEFECTS, describe, fatal
from visiontrain.data.header import ImageError, read_header
from visiontrain.data.images import FileImages
from visiontrain.data.open import DataSpec
from visiontrain.data.table import Defect, Table

EXAMPLES = 3  # defects of one kind shown to people
THREADS = 8
BACKGROUND = 0.5  # share of images without a box from which it is worth a word


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What one split holds."""

    split: str
    images: int  # usable
    boxes: int
    backgrounds: int  # images without a box
    rotated: int  # images that EXIF turns
    classes: dict[str, int]  # name -> boxes
    sizes: dict[str, int]  # "640x480" -> images, most frequent first
    defects: tuple[Defect, ...]

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

    @property
    def trainable(self) -> bool:
        """Tell whether a run would start on it."""
        usable = all(split.boxes for split in self.splits)
        return usable and all(fatal(split.defects, strict=False) is None for split in self.splits)

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [f"{self.source}: {self.format}, {len(self.names)} classes", *self.notes]
        for split in self.splits:
            lines += _split_lines(split)
        return lines

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
    """Read every label and image of `splits`; nothing found here raises.

    Args:
        spec: The data set.
        splits: Which splits; the same picture in two of them is a defect of the later one.
        decode: Also decode the images, which finds truncated and hollow ones.

    Raises:
        DataError: A split is missing, or has no image at all.
    """
    seen: dict[bytes, str] = {}
    reports = tuple(_check_split(split, spec.read(split), seen, decode=decode) for split in splits)
    return Report(spec.source, spec.format, spec.names, spec.notes, reports)


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
        backgrounds=int((np.diff(table.offsets) == 0).sum()),
        rotated=sum(item.rotated for item in looks),
        classes=dict(zip(table.names, counts, strict=True)),
        sizes=dict(sizes.most_common()),
        defects=(*table.defects, *damaged, *repeated),
    )


def _look(source: ImageSource, row: int, *, decode: bool) -> Look:
    """Read image `row` whole."""
    name = source.name(row)
    if not isinstance(source, FileImages):
        return Look(blake2b(source.read(row).tobytes(), digest_size=16).digest())
    try:
        data = images.read_bytes(name)
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
    lines = [
        f"{split.split}: {split.images} images, {split.boxes} boxes, "
        f"{split.backgrounds} images without a box, {split.rotated} turned by EXIF"
    ]
    lines.append("  classes: " + ", ".join(f"{name} {n}" for name, n in split.classes.items()))
    common = list(split.sizes.items())[:EXAMPLES]
    more = f" and {len(split.sizes) - EXAMPLES} more" if len(split.sizes) > EXAMPLES else ""
    lines.append("  sizes: " + ", ".join(f"{size} ({n})" for size, n in common) + more)
    if split.images and split.backgrounds > BACKGROUND * split.images:
        lines.append(
            "  more than half of the images have no box: are the labels where they belong?"
        )
    kinds = Counter(defect.kind for defect in split.defects)
    for kind, count in kinds.most_common():
        what, meaning = DEFECTS[kind]
        done = "" if what == "none" else f" ({what})"
        lines.append(f"  {count} {kind}{done}: {meaning}")
        shown = [defect for defect in split.defects if defect.kind == kind][:EXAMPLES]
        lines += [f"    {describe(defect)}" for defect in shown]
    return lines
