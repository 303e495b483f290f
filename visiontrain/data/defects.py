"""Everything that can be wrong with data, and what is done about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from visiontrain.data.table import Defect

Effect = Literal["none", "doubtful", "clipped", "box dropped", "image dropped", "stops"]

DEFECTS: dict[str, tuple[Effect, str]] = {
    "missing-end": ("none", "a JPEG without its end marker; the picture is all there"),
    "duplicate-image": ("none", "the same picture in two splits: scores would flatter"),
    "near-duplicate": ("none", "almost the same picture in two splits: scores would flatter"),
    "hollow-image": ("none", "a JPEG with its end marker but not all of its picture: grey parts"),
    "extra-picture": ("none", "a sample of a shard has two pictures; one of them is taken"),
    "pickled-member": ("none", "members that could run code when decoded; they never are"),
    "size-mismatch": ("doubtful", "the labels are of an image of another size; they are used"),
    "box-outside": ("clipped", "a box reaches more than 1 % of the side out of the image"),
    "malformed-row": ("box dropped", "a label without the numbers a box needs"),
    "nonfinite-box": ("box dropped", "a coordinate is NaN or infinite"),
    "negative-box": ("box dropped", "a box ends before it starts"),
    "empty-box": ("box dropped", "no area is left inside the image"),
    "duplicate-box": ("box dropped", "the same box and class again in one image"),
    "unknown-image": ("box dropped", "a box belongs to an image that is not listed"),
    "repeated-row": (
        "image dropped",
        "two rows of a CSV give an image other classes; the first counts",
    ),
    "missing-image": ("image dropped", "the file does not exist"),
    "corrupt-image": ("image dropped", "the file is empty, or its header is damaged"),
    "truncated-image": ("image dropped", "the picture ends early or is damaged"),
    "unknown-format": ("image dropped", "no image format that is read"),
    "tiny-image": ("image dropped", "a side is shorter than 10 pixels"),
    "huge-image": ("image dropped", "more pixels than data.max_pixels"),
    "missing-label": ("image dropped", "a sample of a shard has no label that is read"),
    "unsafe-member": ("image dropped", "a shard's member is no plain file, or its name leads out"),
    "truncated-shard": ("image dropped", "a shard ends early: what would follow is not there"),
    "unreadable-shard": ("image dropped", "a shard is missing, or no tar, or another than indexed"),
    "unreadable-labels": ("image dropped", "the label file cannot be parsed"),
    "class-range": ("stops", "a class that is not among the names"),
}


def effect(defect: Defect) -> Effect:
    """Return what is done about `defect`."""
    return DEFECTS[defect.kind][0]


def describe(defect: Defect) -> str:
    """Return `file:line: reason`, as for a user."""
    line = "" if defect.line is None else f":{defect.line}"
    return printable(f"{defect.file}{line}: {defect.reason}")


def printable(text: str) -> str:
    """Return `text` as any terminal takes it: file names need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def fatal(defects: Iterable[Defect], *, strict: bool) -> Defect | None:
    """Return the first defect a run must not start with, if any."""
    found = (defect for defect in defects if effect(defect) != "none")
    return next((defect for defect in found if strict or effect(defect) == "stops"), None)


def counted(number: int, noun: str) -> str:
    """Write a number and what it counts, in the plural where it is not one: `1 box`, `2 boxes`."""
    plural = "es" if noun.endswith(("s", "x")) else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def summary(defects: Sequence[Defect]) -> str:
    """Count the kinds, most frequent first: `3 truncated-image, 1 empty-box`."""
    counts = Counter(defect.kind for defect in defects)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
