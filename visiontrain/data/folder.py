"""Classes as folders: `train/cat/1.jpg`, or `cat/1.jpg`, of which some are held out for val."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

from visiontrain.core.errors import DataError
from visiontrain.core.seed import derive
from visiontrain.data.build import build_labelled
from visiontrain.data.defects import counted
from visiontrain.data.description import SPLITS, Choice, Description, some, unique_names
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Table
from visiontrain.data.walk import holds_pictures, holds_runs, is_hidden, is_picture, walk

KEYS = ("path", *SPLITS, "validation", "names", "holdout")
FOLDERS = {  # what a split's folder may be called
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SPLIT_NAMES = frozenset(chain(*FOLDERS.values()))
HELD_OUT = 0.1  # share of each class
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
        named = self.description.values.get("names") is not None
        places = [place for place in self.splits.values() if place is not None]
        for folder in dict.fromkeys(self.root / place for place in places):
            listed = _folders(folder) if folder.is_dir() else []  # told when it is read
            others = [path for path in listed if path.name not in self.names]
            if not named:  # others that another split has are refused when it is read
                others = [path for path in others if path.name.startswith("_")]
            left = [path.name for path in others if holds_pictures(path)]
            if left:
                yield (
                    f"{folder}: {counted(len(left), 'folder')} of pictures left out, being no "
                    f"class of `names:`: {some(left)}"
                )

    def _share(self) -> float:
        share = self.description.values.get("holdout", HELD_OUT)
        if not isinstance(share, int | float) or not 0 < share < 1:
            raise self.description.fail("holdout", f"got {share!r}", "give a share such as 0.1")
        return float(share)

    def _items(self, split: str) -> list[Item]:
        """List (class, path) of a split, class by class."""
        if self.splits[split] is not None and self.splits.get("val", "") is not None:
            return self._listed(split)
        held = {path for _, path in self._held_out()}
        if self.splits[split] is None:
            return self._held_out()
        items = self._listed(split)
        return [item for item in items if item[1] not in held] if split == "train" else items

    def _held_out(self) -> list[Item]:
        """Return the share of train that is val: those whose names hash lowest in their class."""
        by_class: dict[str, list[str]] = {}
        for name, path in self._listed("train"):
            by_class.setdefault(name, []).append(path)
        held = []
        for name, paths in by_class.items():
            count = max(1, round(self.share * len(paths))) if len(paths) > 1 else 0
            ordered = sorted(paths, key=self._hash)
            held += [(name, path) for path in sorted(ordered[:count])]
        return held

    def _hash(self, path: str) -> int:
        """Order the files of train, wherever the data set lies."""
        place = self.splits["train"]
        if (self.root / place).is_dir():
            return derive("holdout", os.path.relpath(path, self.root))
        return derive("holdout", place, os.path.relpath(path, self._folder("train")))

    def _listed(self, split: str) -> list[Item]:
        folder = self._folder(split)
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

    def _folder(self, split: str) -> Path:
        place = self.splits[split]
        folder = self.root / place
        if not folder.is_dir() and self.description.values.get("path") is None:
            folder = self.description.locate(split, place)
        if not folder.is_dir():
            raise DataError(f"{self.description.where}: no folder {folder}; correct the path")
        return Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links

    def _classes(self) -> list[str]:
        folder = self._folder(next(iter(self.splits)))
        found = [path.name for path in class_folders(folder)]
        if len(found) < 2:
            raise DataError(
                f"{folder}: {counted(len(found), 'folder')} in it, where each class has one; "
                "give the folder that holds those of the classes"
            )
        return found


def class_folders(folder: Path) -> list[Path]:
    """Return the folders below `folder` that are classes where none are named, sorted by name."""
    return [path for path in _folders(folder) if not path.name.startswith("_")]


def _folders(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))
    return sorted(path for path in found if not holds_runs(path))


def splits_of(root: Path) -> dict[str, str] | None:
    """Return which folders of `root` are splits: "train" -> "training"; {} for classes without.

    Returns:
        None where `root` is no data set of class folders.

    Raises:
        DataError: two folders are one split, or pictures of a split lie in no folder of a class.
    """
    by_name: dict[str, list[Path]] = {}
    for path in _folders(root):
        by_name.setdefault(path.name.lower(), []).append(path)
    there = {
        split: _each_once(path for name in names for path in by_name.get(name, ()))
        for split, names in FOLDERS.items()
    }
    if not any(map(_holds_classes, there["train"])):
        return _scored_only(root, there) or _unsplit(root)
    for split, paths in there.items():
        if len(paths) > 1:
            raise DataError(
                f"{root}: {some([path.name for path in paths])} are all {split}; name one in a "
                "YAML (format: folder), or move the others away"
            )
    (train,) = there["train"]
    found = {"train": train.name}
    for path in there["val"]:
        if not any(map(holds_pictures, class_folders(path))):
            raise DataError(
                f"{path}: pictures without folders of their classes; sort them as in train, "
                "name them in a CSV (format: csv), or move them away"
            )
        found["val"] = path.name
    for path in there["test"]:  # often without classes: nothing is lost if it is left alone
        own = {sub.name for sub in class_folders(path)}
        if own and own <= {sub.name for sub in class_folders(train)}:
            found["test"] = path.name
    return found


def _holds_classes(folder: Path) -> bool:
    return len(list(islice(holding(folder), 2))) == 2


def _scored_only(root: Path, there: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Return the splits of a root that has none to train on, and no class beside them.

    Raises:
        DataError: classes beside them, among which their pictures would be one.
    """
    classes = {name for name in holding(root) if name.lower() not in SPLIT_NAMES}
    for path in chain(*there.values()):
        if classes & {*holding(path)}:
            raise DataError(
                f"{root}: the classes {some(sorted(classes))}, and {path.name} with folders of "
                "classes; move those to train on into train/"
            )
    found = {split: path.name for split, paths in there.items() for path in paths[:1]}
    whole = all(_holds_classes(root / name) for name in found.values())
    return found if whole and not classes else {}


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Leave out folders without pictures, and links to one that is there already."""
    found: list[Path] = []
    for path in paths:
        if holds_pictures(path) and not any(path.samefile(other) for other in found):
            found.append(path)
    return found


def _unsplit(root: Path) -> dict[str, str] | None:
    """Tell classes from splits whose pictures lie in no folder of a class; as `splits_of`."""
    names = []
    for name in holding(root):
        names.append(name)
        if len(names) > 1 and any(one.lower() not in SPLIT_NAMES for one in names):
            return {}
    if len(names) > 1:
        raise DataError(
            f"{root}: pictures in {some(names)}, but not in a folder for each class; sort "
            "them so, or describe them in a YAML, see datasets/README.md"
        )
    return None


def holding(folder: Path) -> Iterator[str]:
    """Yield the names of the class folders of `folder` that hold pictures themselves."""
    for path in class_folders(folder):
        with suppress(OSError), os.scandir(path) as entries:  # such as lost+found
            if any(is_picture(entry.name) for entry in entries):
                yield path.name
