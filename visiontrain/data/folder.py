"""Classes as folders: `train/cat/1.jpg`, or `cat/1.jpg`, of which some are held out for val."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
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
from visiontrain.data.walk import is_hidden, is_picture, walk

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
        self.splits: Mapping[str, Any] = self._given() or {"train": "."}
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

    def _given(self) -> dict[str, str]:
        """Return the folder of each split that the description names."""
        values = self.description.values
        given = {split: values.get(split) for split in SPLITS}
        given["val"] = given["val"] or values.get("validation")
        for split, place in given.items():
            if place is not None and not isinstance(place, str):
                raise self.description.fail(split, f"got {place!r}", "give one folder")
        if given["val"] is not None and "holdout" in values:
            got = f"{values['holdout']}, but val is given"
            raise self.description.fail("holdout", got, "leave one of them out")
        return {split: place for split, place in given.items() if place is not None}

    def _notes(self) -> Iterator[str]:
        """Say what is held out, and which folders of pictures are no class of `names:`."""
        if "val" in self.splits and self.splits["val"] is None:
            held = f"no val, so {self.share:.0%} of each class of train is held out for it"
            yield f"{self.description.where}: {held}"
        if "train" in self.splits:
            folder = self._folder(self.splits["train"])
            empty = [name for name in self.names if not any(self._walk(folder / name))]
            if empty:
                yield f"{folder}: no picture of {_some(empty)}"
        if self.description.values.get("names") is None:
            return  # one that another split has is refused when it is read
        places = [place for place in self.splits.values() if place is not None]
        for folder in dict.fromkeys(self.root / place for place in places):
            listed = class_folders(folder) if folder.is_dir() else []  # told when it is read
            others = [
                path.name for path in listed if path.name not in self.names and any(walk(path))
            ]
            if others:
                yield (
                    f"{folder}: {counted(len(others), 'folder')} of pictures left out, being no "
                    f"class of `names:`: {_some(others)}"
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
        if not folder.is_dir() and self.description.values.get("path") is None:
            folder = self.description.locate("train", place)
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


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def class_folders(folder: Path) -> list[Path]:
    """Return the folders below `folder` that may be classes, sorted by name.

    One whose name begins with _ is of a tool, unless it holds pictures.
    """
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    return [path for path in found if path.name[0] != "_" or any(walk(path))]


def split_folders(root: Path) -> dict[str, str]:
    """Return which folders of `root` are splits: "train" -> "training".

    Raises:
        DataError: two folders are one split, or one that is scored has no folders of classes.
    """
    by_name: dict[str, list[Path]] = {}
    for path in sorted(root.iterdir()):
        if path.is_dir():
            by_name.setdefault(path.name.lower(), []).append(path)
    there = {
        split: [path for name in names for path in by_name.get(name, ()) if any(walk(path))]
        for split, names in FOLDERS.items()
    }
    if not any(len(holding(path)) > 1 for path in there["train"]):
        return {}
    for split, paths in there.items():
        if len(paths) > 1:
            raise DataError(
                f"{root}: {_some([path.name for path in paths])} are all {split}; name one in a "
                "YAML (format: folder), or move the others away"
            )
    sorted_in = {
        split: path.name
        for split, paths in there.items()
        for path in paths
        if any(any(walk(own)) for own in class_folders(path))
    }
    if there["val"] and "val" not in sorted_in:
        raise DataError(
            f"{there['val'][0]}: pictures without folders of their classes; sort them as in train, "
            "name them in a CSV (format: csv), or move them away"
        )
    return sorted_in


def holding(folder: Path) -> list[str]:
    """Name the folders directly below `folder` that hold pictures themselves."""
    found = []
    for path in class_folders(folder):
        try:
            with os.scandir(path) as entries:
                if any(is_picture(entry.name) for entry in entries):
                    found.append(path.name)
        except OSError:  # such as lost+found: told if it is taken for a class
            continue
    return found


def is_root(folder: Path) -> bool:
    """Tell whether `folder` is a data set of class folders, with or without splits.

    Raises:
        DataError: as `split_folders`; or its splits hold pictures, but no folders of classes.
    """
    if split_folders(folder):
        return True
    names = holding(folder)
    splits = [name for name in names if name.lower() in chain(*FOLDERS.values())]
    if len(names) > 1 and len(splits) == len(names):
        raise DataError(
            f"{folder}: pictures in {_some(names)}, but not in a folder for each class; sort "
            "them so, or describe them in a YAML, see datasets/README.md"
        )
    return len(names) > 1
