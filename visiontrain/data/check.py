"""Look at all of a data set before training on it: what `visiontrain check` prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from visiontrain.core.errors import DataError
from visiontrain.data.census import Balance, BoxSizes, advice, balance_of, box_sizes
from visiontrain.data.defects import DEFECTS, counted, describe, fatal, printable
from visiontrain.data.looks import Look, Pair, defect_of, find_pairs, look_at_all
from visiontrain.data.open import DataSpec
from visiontrain.data.table import Defect, Table

EXAMPLES = 3  # defects of one kind shown to people
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
    box_sizes: BoxSizes | None = None  # of boxes that are trained on
    duplicates: int = 0  # images that an earlier split has, too
    near_duplicates: int = 0  # those that it has almost
    repeated: int = 0  # images that have a twin, the same or nearly, in this split
    defects: tuple[Defect, ...] = ()
    problem: str | None = None  # why it cannot be read at all

    @property
    def usable(self) -> bool:
        """Tell whether a run could train on it, or score it."""
        enough = self.boxes > (self.ignored if self.split == "train" else 0)
        return self.images > 0 and enough and fatal(self.defects, strict=False) is None

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold, under the names of the fields."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        defects = [
            {"file": defect.file, "line": defect.line, "kind": defect.kind, "reason": defect.reason}
            for defect in self.defects
        ]
        sizes = self.box_sizes.as_json() if self.box_sizes else None
        return fields | {"defects": defects, "box_sizes": sizes}


@dataclass(frozen=True, slots=True)
class Report:
    """What a data set holds, and what is wrong with it."""

    source: str
    format: str
    names: tuple[str, ...]
    notes: tuple[str, ...]
    splits: tuple[SplitReport, ...]
    missing: tuple[tuple[str, str], ...]  # splits that a run needs, and how to add each
    tables: Mapping[str, Table]  # of the splits that could be read
    pairs: tuple[Pair, ...]  # pictures in two splits
    balance: Balance
    advice: tuple[str, ...]
    imgsz: int  # side of the input that sizes of boxes are told for
    seconds: float  # that reading took

    @property
    def trainable(self) -> bool:
        """Tell whether a run would start on it: on train, scored by val."""
        return set(NEEDED) <= {split.split for split in self.splits if split.usable}

    @property
    def failed(self) -> bool:
        """Tell whether anything is worse than a warning: no run would start, or a split is lost."""
        return not self.trainable or any(split.problem for split in self.splits)

    @property
    def images_per_s(self) -> float:
        """How fast images were read."""
        return sum(map(len, self.tables.values())) / max(self.seconds, 1e-9)

    def lines(self) -> list[str]:
        """Return the report for people."""
        classes = counted(len(self.names), "class")
        lines = [f"{self.source}: {self.format}, {classes}", *self.notes]
        for split in self.splits:
            lines += _split_lines(split)
        lines += [
            f"{split}: no such split, and a run needs it; {how}" for split, how in self.missing
        ]
        lines += [f"advice: {line}" for line in self.advice]
        images = counted(sum(map(len, self.tables.values())), "image")
        lines.append(f"read {images} in {self.seconds:.1f} s, {self.images_per_s:,.0f} a second")
        return [printable(line) for line in lines]

    def as_json(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "source": self.source,
            "format": self.format,
            "names": list(self.names),
            "notes": list(self.notes),
            "trainable": self.trainable,
            "failed": self.failed,
            "missing": dict(self.missing),
            "balance": self.balance.as_json(),
            "advice": list(self.advice),
            "imgsz": self.imgsz,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_per_s, 1),
            "splits": {split.split: split.as_json() for split in self.splits},
        }


def check(
    spec: DataSpec, splits: Sequence[str], *, decode: bool = True, imgsz: int = 640
) -> Report:
    """Read every label and image of `splits`; nothing that is wrong with them raises.

    Args:
        spec: The data set.
        splits: Which splits; the same picture in two of them is a defect of the later one.
        decode: Also decode the images, which finds truncated and hollow ones, and near duplicates.
        imgsz: Side of the input that sizes of boxes are told for.
    """
    started = time.perf_counter()
    tables: dict[str, Table] = {}
    problems: dict[str, str] = {}
    for split in splits:
        try:
            tables[split] = spec.read(split)
        except DataError as error:
            problems[split] = str(error)
    looks = {split: look_at_all(table, decode=decode) for split, table in tables.items()}
    pairs, again = find_pairs(list(looks.items()))
    reports = [
        SplitReport(split, problem=problems[split])
        if split in problems
        else _split_report(split, tables, looks[split], pairs, (again[split], imgsz))
        for split in splits
    ]
    return Report(
        spec.source,
        spec.format,
        spec.names,
        spec.notes,
        splits=tuple(reports),
        missing=tuple((s, spec.how_to_add(s)) for s in NEEDED if s not in spec.splits),
        tables=tables,
        pairs=tuple(pairs),
        balance=balance_of(tables),
        advice=tuple(advice(tables, imgsz)),
        imgsz=imgsz,
        seconds=time.perf_counter() - started,
    )


def _split_report(
    split: str,
    tables: Mapping[str, Table],
    looks: Sequence[Look],
    pairs: Sequence[Pair],
    rest: tuple[int, int],
) -> SplitReport:
    """Describe a split; `rest` is how many of its images have twins in it, and the input's side."""
    table, (again, imgsz) = tables[split], rest
    damaged = [item.defect for item in looks if item.defect is not None]
    own = [pair for pair in pairs if pair.split == split]
    repeated = [
        defect_of(
            pair,
            table.images.name(pair.row),
            tables[pair.other_split].images.name(pair.other_row),
        )
        for pair in own
    ]
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
        box_sizes=box_sizes(table, imgsz),
        duplicates=sum(not pair.apart for pair in own),
        near_duplicates=sum(pair.apart > 0 for pair in own),
        repeated=again,
        defects=(*table.defects, *damaged, *repeated),
    )


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
    if split.box_sizes is not None:
        lines.append(f"  boxes: {split.box_sizes.line()}")
    if split.repeated:
        lines.append(f"  {counted(split.repeated, 'image')} with a twin in {split.split} itself")
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
