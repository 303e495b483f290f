"""What a data set consists of, and what that means for training: classes, and sizes of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontrain.data.defects import counted
from visiontrain.data.order import image_classes
from visiontrain.data.table import Table

SMALL, LARGE = 32**2, 96**2  # areas between which COCO calls boxes medium, pixels
TINY = 8  # side below which a box has no cell of the finest level of its own, pixels
THIN = 10  # long side over short side
WORTH = 0.05  # share of boxes that are tiny from which it is worth a word
RARE = 4  # times fewer images than an even share from which balancing is worth a word
NAMED = 5  # classes that a line names


@dataclass(frozen=True, slots=True)
class BoxSizes:
    """How large the boxes of a split are; crowds and difficult ones are left out."""

    small: int  # below 32 x 32 pixels of the original, as COCO counts
    medium: int
    large: int  # above 96 x 96
    imgsz: int  # side of the input
    tiny_at_imgsz: int  # narrower than 8 pixels there (square root of the area)
    median_at_imgsz: float  # pixels
    thin: int  # more than ten times as long as wide
    most_thin: float  # long side over short side
    most_in_image: int

    @property
    def boxes(self) -> int:
        """How many there are."""
        return self.small + self.medium + self.large

    def line(self) -> str:
        """Say it to people."""
        parts = [f"{self.small:,} small, {self.medium:,} medium, {self.large:,} large as in COCO"]
        parts.append(f"median {self.median_at_imgsz:.0f} px at imgsz={self.imgsz}")
        parts.append(f"{self.tiny_at_imgsz:,} below {TINY} px there")
        parts.append(f"longest {self.most_thin:.1f} : 1")
        return ", ".join(parts) + f", at most {counted(self.most_in_image, 'box')} in an image"

    def as_json(self) -> dict[str, Any]:
        """Return the fields by their names."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Balance:
    """How often classes are labelled."""

    ratio: float | None  # most frequent over rarest class of train, of those that are there
    most: str | None
    least: str | None
    missing: Mapping[str, Sequence[str]]  # split -> classes without a label in it

    def as_json(self) -> dict[str, Any]:
        """Return the fields by their names."""
        return asdict(self) | {"missing": {split: list(n) for split, n in self.missing.items()}}


def sides_at(table: Table, imgsz: int) -> NDArray[np.float64]:
    """Return the geometric mean of the sides of each box (K,) where images are `imgsz` long."""
    owner = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    scale = imgsz / table.sizes.max(axis=1)[owner]
    extent = (table.boxes[:, 2:] - table.boxes[:, :2]).astype(np.float64)
    return np.sqrt(extent.prod(axis=1)) * scale


def box_sizes(table: Table, imgsz: int) -> BoxSizes | None:
    """Measure the boxes of a table; None where it has none to train on."""
    keep = ~(table.crowd | table.difficult)
    if table.task != "detect" or not keep.any():
        return None
    extent = (table.boxes[keep, 2:] - table.boxes[keep, :2]).astype(np.float64)
    shape = extent.max(axis=1) / extent.min(axis=1)
    side, area = sides_at(table, imgsz)[keep], table.area[keep]
    owner = np.repeat(np.arange(len(table)), np.diff(table.offsets))[keep]
    small, large = int((area < SMALL).sum()), int((area > LARGE).sum())
    return BoxSizes(
        small=small,
        medium=int(keep.sum()) - small - large,
        large=large,
        imgsz=imgsz,
        tiny_at_imgsz=int((side < TINY).sum()),
        median_at_imgsz=round(float(np.median(side)), 1),
        thin=int((shape > THIN).sum()),
        most_thin=round(float(shape.max()), 2),
        most_in_image=int(np.bincount(owner).max()),
    )


def class_counts(table: Table) -> NDArray[np.int64]:
    """Count the labels of each class (C,) that are trained on."""
    keep = ~(table.crowd | table.difficult)
    return np.bincount(table.classes[keep], minlength=len(table.names))


def balance_of(tables: Mapping[str, Table]) -> Balance:
    """Compare classes: within train, and what train and val lack."""
    missing = {
        split: [tables[split].names[k] for k in np.flatnonzero(class_counts(tables[split]) == 0)]
        for split in ("train", "val")
        if split in tables
    }
    counts = class_counts(tables["train"]) if "train" in tables else np.zeros(0, np.int64)
    there = np.flatnonzero(counts)
    if len(there) < 2:
        return Balance(None, None, None, missing)
    names, order = tables["train"].names, there[np.argsort(counts[there], kind="stable")]
    most, least = int(order[-1]), int(order[0])
    return Balance(
        round(float(counts[most] / counts[least]), 2), names[most], names[least], missing
    )


def advice(tables: Mapping[str, Table], imgsz: int) -> list[str]:
    """Return what to do about it, a line each; nothing where there is nothing worth it."""
    lines = []
    for split, names in balance_of(tables).missing.items():
        what = "cannot be learned" if split == "train" else "cannot be scored"
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            listed = ", ".join(names[:NAMED]) + more
            lines.append(f"{split} has no label of {listed}, which {what}; add some")
    if "train" in tables:
        lines += _about_rare(tables["train"]) + _about_sizes(tables["train"], imgsz)
    return lines


def _about_rare(table: Table) -> list[str]:
    """Advise to balance where a class is in far fewer images than an even share of them.

    Images count, not boxes: a class that is in every image can't be shown more often.
    """
    label = image_classes(table)[1]
    images = np.bincount(label, minlength=len(table.names))
    there = np.flatnonzero(images)
    rare = [k for k in there if images[k] * len(there) * RARE <= len(table)]
    if not rare:
        return []
    rarest = min(rare, key=lambda k: images[k])
    many = f"{counted(len(rare), 'class')} of {len(there)}"
    kind = "class" if table.task == "classify" and not table.several else "repeat"
    return [
        f"{many} in few images of train ({table.names[rarest]} in {images[rarest]:,} of "
        f"{len(table):,}); try data.balance={kind}"
    ]


def _about_sizes(table: Table, imgsz: int) -> list[str]:
    sizes = box_sizes(table, imgsz)
    if sizes is None:
        return []
    lines = []
    if sizes.tiny_at_imgsz > WORTH * sizes.boxes:
        longest = int(np.median(table.sizes.max(axis=1)))
        larger = min(2 * imgsz, -(-longest // 32) * 32)
        ways = [f"imgsz={larger}"] if larger > imgsz else []
        ways += ["model.finest=4", "data.tile=640"]
        share = sizes.tiny_at_imgsz / sizes.boxes
        lines.append(
            f"{share:.0%} of the boxes are below {TINY} px at imgsz={imgsz} and hard to find; try "
            + " or ".join(ways)
        )
    if sizes.thin > WORTH * sizes.boxes:
        lines.append(
            f"{sizes.thin / sizes.boxes:.0%} of the boxes are more than {THIN} times as long as "
            "wide: are corners in the right order?"
        )
    return lines
