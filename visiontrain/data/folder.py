"""Classes as folders: `train/cat/1.jpg`, or `cat/1.jpg`, of which some are held out for val."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from visiontrain.core.errors import DataError
from visiontrain.core.seed import derive
from visiontrain.data.build import build_labelled
from visiontrain.data.defects import counted
from visiontrain.data.description import SPLITS, Choice, Description, unique_names
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Table
from visiontrain.data.walk import is_picture, walk

KEYS = ("path", *SPLITS, "validation", "names", "holdout")
FOLDERS = {  # what a split's folder may be called
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
HELD_OUT = 0.1  # share of each class
LISTED = 5  # folders that a note names
Item = tuple[str, str]  # class, path


class FolderReader:
    """A root of class folders; where there is no `val`, a share of `train` is held out for it."""

    task = "classify"
    several = False  # an image lies in one folder

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        self.description = description
        self.root = description.root()
        self.share = self._share()
        given = {split: description.values.get(split) for split in SPLITS}
        given["val"] = given["val"] or description.values.get("validation")
        self.splits: Mapping[str, Any] = {s: p for s, p in given.items() if p is not None} or {
            "train": "."
        }
        if "train" in self.splits and "val" not in self.splits:
            self.splits = {**self.splits, "val": None}  # held out
        self.names = description.names() or unique_names(self._classes(), description.where)
        self.notes = tuple(self._notes())

    def read(self, split: str, choice: Choice) -> Table:
        """List the images of `split`, and look at each one's header."""
        items = self._items(split)
        if not items:
            raise DataError(
                f"{self.description.where}: {split}: no image in the folders of "
                f"{counted(len(self.names), 'class')} under {self.root}"
            )
        chosen = [items[row] for row in choice.rows(len(items))]
        images = FileImages(Paths(path for _, path in chosen), self.description.max_pixels)
        seen = scan(images.paths, images.max_pixels, self.description.cache)
        number = {name: label for label, name in enumerate(self.names)}
        labels = [(row, number[name]) for row, (name, _) in enumerate(chosen)]
        return build_labelled(self.names, images, seen, labels)

    def _notes(self) -> Iterator[str]:
        """Say what is held out, and which folders of pictures are no class of `names:`."""
        if "val" in self.splits and self.splits["val"] is None:
            held = f"no val, so {self.share:.0%} of each class of train is held out for it"
            yield f"{self.description.where}: {held}"
        if self.description.values.get("names") is None:
            return  # one that another split has is refused when it is read
        places = [place for place in self.splits.values() if place is not None]
        for folder in dict.fromkeys(self.root / place for place in places):
            listed = class_folders(folder) if folder.is_dir() else []  # told when it is read
            others = [
                path.name for path in listed if path.name not in self.names and any(walk(path))
            ]
            if others:
                told = ", ".join(others[:LISTED]) + (", ..." if len(others) > LISTED else "")
                yield (
                    f"{folder}: {counted(len(others), 'folder')} of pictures left out, being no "
                    f"class of `names:`: {told}"
                )

    def _share(self) -> float:
        share = self.description.values.get("holdout", HELD_OUT)
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise self.description.fail("holdout", f"got {share!r}", "give a share such as 0.1")
        return float(share)

    def _items(self, split: str) -> list[Item]:
        """List (class, path) of a split, class by class."""
        place = self.splits[split]
        if place is not None and self.splits.get("val", "") is not None:
            return self._listed(place)
        held = {path for _, path in self._held_out()}
        if place is None:
            return self._held_out()
        items = self._listed(place)
        return [item for item in items if item[1] not in held] if split == "train" else items

    def _held_out(self) -> list[Item]:
        """Return the share of train that is val: those whose names hash lowest in their class."""
        by_class: dict[str, list[str]] = {}
        for name, path in self._listed(self.splits["train"]):
            by_class.setdefault(name, []).append(path)
        held = []
        for name, paths in by_class.items():
            count = max(1, round(self.share * len(paths))) if len(paths) > 1 else 0
            ordered = sorted(
                paths, key=lambda path: derive("holdout", os.path.relpath(path, self.root))
            )
            held += [(name, path) for path in sorted(ordered[:count])]
        return held

    def _listed(self, place: str) -> list[Item]:
        folder = self._folder(place)
        own = [path.name for path in class_folders(folder)]
        strange = [name for name in own if name not in self.names]
        if strange and self.description.values.get("names") is None:
            raise DataError(
                f"{folder}: a folder {strange[0]!r}, which train has not; name all classes with "
                "names: in the data set's YAML"
            )
        return [(name, path) for name in self.names for path in self._walk(folder / name)]

    def _walk(self, folder: Path) -> Iterable[str]:
        return walk(folder) if folder.is_dir() else ()

    def _folder(self, place: str) -> Path:
        folder = self.root / place
        if not folder.is_dir():
            raise DataError(f"{self.description.where}: no folder {folder}; correct the path")
        return Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links

    def _classes(self) -> list[str]:
        folder = self._folder(next(iter(self.splits.values())))
        found = [path.name for path in class_folders(folder)]
        if len(found) < 2:
            raise DataError(
                f"{folder}: {counted(len(found), 'folder')} in it, where each class has one; "
                "give the folder that holds those of the classes"
            )
        return found


def class_folders(folder: Path) -> list[Path]:
    """Return the folders below `folder` that may be classes, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[:1] not in "._")


def split_folders(root: Path) -> dict[str, str]:
    """Return which folders of `root` are splits: "train" -> "training"."""
    found = {path.name.lower(): path.name for path in root.iterdir() if path.is_dir()}
    return {
        split: found[name]
        for split, names in FOLDERS.items()
        for name in names
        if name in found and holds_classes(root / found[name])
    }


def holds_classes(folder: Path) -> bool:
    """Tell whether two folders or more directly below `folder` hold pictures."""
    holding = 0
    for path in class_folders(folder):
        with os.scandir(path) as entries:
            holding += any(is_picture(entry.name) for entry in entries)
        if holding == 2:
            return True
    return False


def is_root(folder: Path) -> bool:
    """Tell whether `folder` is a data set of class folders, with or without splits."""
    return "train" in split_folders(folder) or holds_classes(folder)
