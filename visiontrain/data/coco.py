"""COCO data sets: one JSON file per split, boxes as x, y, width, height in pixels."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.data.build import Labels, build
from visiontrain.data.defects import counted
from visiontrain.data.description import Choice, Description, unique_names
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.spelling import spellings
from visiontrain.data.table import Defect, Table

KEYS = ("path", "train", "val", "validation", "test", "images", "names", "nc")
WORD = r"(?<![a-z])(train|validation|valid|val|test)(?=\d*(?![a-z]))"
SPLIT = re.compile(WORD, re.IGNORECASE)  # in a file's name
FOLDER = re.compile(rf"{WORD}\d*", re.IGNORECASE)
Record = Mapping[str, Any]
ROLES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}


class CocoReader:
    """COCO JSON files of the splits, and the folders their `file_name`s are relative to."""

    task = "detect"
    several = False

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        self.description = description
        self.root = description.root()
        self.splits: Mapping[str, Any] = {
            split: self._one(split, entries) for split, entries in description.sources().items()
        }
        self.folders = description.values.get("images", {})
        if not isinstance(self.folders, dict | str):
            raise description.fail("images", f"got {self.folders!r}", "give a folder per split")
        self.notes: tuple[str, ...] = ()
        self.names = description.names() or self._find_names()

    def read(self, split: str, choice: Choice) -> Table:
        """Read the annotations of `split`; category ids become positions in `names`."""
        file = self._file(split)
        content = load(file)
        images = self._unique(content["images"], file)
        if not images:
            raise DataError(f"{file}: images: none listed; add some")
        chosen = [images[row] for row in choice.rows(len(images))]
        names = [str(image["file_name"]) for image in chosen]
        folder, names = self._found(split, file, names)
        source = FileImages(Paths(folder / name for name in names), self.description.max_pixels)
        seen = scan(source.paths, source.max_pixels, self.description.cache)
        labels = Labels()
        _compare_sizes(chosen, seen.sizes, file, labels)
        rows = {image["id"]: row for row, image in enumerate(chosen)}
        known = frozenset(image["id"] for image in images)
        numbers = self._numbers(content["categories"])
        adder = Adder(str(file), rows, known, numbers, labels)
        for place, item in enumerate(content["annotations"]):
            adder.add(item, place)
        table = build(
            self.names,
            source,
            seen,
            labels,
            lambda row: f"{file} ({source.name(row)})",
            single_cls=self.description.single_cls,
        )
        return replace(
            table,
            image_ids=np.array([int(image["id"]) for image in chosen], np.int64)[seen.usable],
            category_ids=_ids(numbers, used_ids(content), len(self.names)),
        )

    def _one(self, split: str, entries: Sequence[str]) -> str:
        if len(entries) != 1:
            raise self.description.fail(split, f"{len(entries)} files", "give one COCO JSON")
        return entries[0]

    def _file(self, split: str) -> Path:
        """Find the JSON of `split`: only when it is read, one that is missing may not be needed."""
        place = self.root / self.splits[split]
        return place if place.exists() else self.description.locate(split, self.splits[split])

    def _find_names(self) -> tuple[str, ...]:
        """Take the categories of the first split, by id, but for what exporters add to them."""
        first, *others = self.splits
        file = self._file(first)
        content = load(file)
        if not content["categories"]:
            raise DataError(f"{file}: categories: none; add some")
        categories = sorted(content["categories"], key=lambda category: category["id"])
        used = used_pairs(content)
        if needless(categories, used):  # a whole file each, so only where it matters
            for split in others:
                with suppress(DataError):  # told when the split itself is read
                    used |= used_pairs(load(self._file(split)))
        left_out = needless(categories, used)
        if left_out:
            told = ", ".join(f"{category['id']} {category['name']!r}" for category in left_out)
            self.notes = (f"{file}: left out categories without an annotation: {told}",)
        return unique_names([str(c["name"]) for c in categories if c not in left_out], str(file))

    def _numbers(self, categories: Sequence[Record]) -> dict[int, int]:
        """Map category ids to positions in `names`; by name, so that files may number apart."""
        places = {name: place for place, name in enumerate(self.names)}
        return {
            category["id"]: places[str(category["name"])]
            for category in categories
            if str(category["name"]) in places
        }

    def _unique(self, images: Sequence[Record], file: Path) -> list[Record]:
        """Refuse two images of one id: their boxes could not be told apart."""
        seen: set[Any] = set()
        for image in images:
            if image["id"] in seen:
                raise DataError(f"{file}: images: two have id {image['id']}; number them apart")
            seen.add(image["id"])
        return list(images)

    def _found(self, split: str, file: Path, names: list[str]) -> tuple[Path, list[str]]:
        """Find the folder of the images, where most of them are, and how they are named in it.

        Where none is found as it is written, names may be another machine's.
        """
        folders, told = self._folders(split, file)
        for some, spelled in spellings(names):
            # Not with Path's is_file, which raises at a name that is too long.
            hits = [sum(map(os.path.isfile, (folder / n for n in some))) for folder in folders]
            if any(hits):
                return folders[hits.index(max(hits))], spelled
        if told:  # every image is then told as missing
            return folders[0], names
        listed = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise DataError(
            f"{file}: none of its images, such as {names[0]}, in {listed}; say where they are: "
            f"`images: {{{split}: ...}}` in a YAML with `format: coco`"
        )

    def _folders(self, split: str, file: Path) -> tuple[list[Path], bool]:
        """List where images may be; and whether the YAML tells it."""
        said = self.folders if isinstance(self.folders, str) else self.folders.get(split)
        if said is not None:
            return [self.root / said], True
        year = re.sub(r"^(instances|annotations?)_", "", file.stem)  # instances_val2017
        guesses = [
            file.parent,
            file.parent / "images",
            *(base / name for base in (file.parent.parent, self.root) for name in (year, split)),
            *(file.parent.parent / "images" / name for name in (year, split, "")),
        ]
        return guesses, False


def load(file: Path) -> dict[str, list[Any]]:
    """Read a COCO JSON and check that its three lists are there.

    Raises:
        DataError: It is no COCO JSON.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: no readable JSON ({error}); export it again") from error
    needed = {"images": ("id", "file_name"), "annotations": (), "categories": ("id", "name")}
    for key, fields in needed.items():
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise DataError(
                f"{file}: no list `{key}`; a COCO file has images, annotations, categories"
            )
        for place, entry in enumerate(entries if fields else []):
            reason = _unusable(entry, fields)
            if reason:
                raise DataError(f"{file}: {key}[{place}]: {reason}")
    return content


def _unusable(entry: Any, fields: Sequence[str]) -> str:
    """Say what `entry` lacks: a usable id, or a text in the other fields."""
    if not isinstance(entry, dict) or any(entry.get(field) is None for field in fields):
        return f"needs {' and '.join(fields)}"
    if not _is_id(entry["id"]):
        return f"id {entry['id']!r}; a whole number is needed"
    others = (field for field in fields if field != "id")
    wrong = next((field for field in others if not isinstance(entry[field], int | str)), None)
    return f"{wrong} {entry[wrong]!r}; a text is needed" if wrong else ""


def used_ids(content: Mapping[str, Sequence[Any]]) -> set[int]:
    """Return the category ids that annotations have."""
    found = (item.get("category_id") for item in content["annotations"] if isinstance(item, dict))
    return {category for category in found if _is_id(category)}


def used_pairs(content: Mapping[str, Sequence[Any]]) -> set[tuple[int, str]]:
    """Return id and name of the categories that annotations have."""
    ids = used_ids(content)
    return {(c["id"], str(c["name"])) for c in content["categories"] if c["id"] in ids}


def needless(categories: Sequence[Record], used: set[tuple[int, str]]) -> list[Record]:
    """Return the categories that are no classes of their own.

    Roboflow lists the project beside its classes, as their supercategory, and some exporters list
    a class twice: without an annotation, neither is anything to learn.
    """
    names = {name for _, name in used}
    above = {str(c.get("supercategory")) for c in categories if c.get("supercategory") != c["name"]}
    found = []
    listed = Counter(str(category["name"]) for category in categories)
    for category in categories:
        name = str(category["name"])
        if (category["id"], name) in used:
            continue
        if listed[name] > 1:  # one of each name stays
            listed[name] -= 1
            found.append(category)
        elif name in above and name not in names:
            found.append(category)
    return found


def _ids(numbers: Mapping[int, int], used: set[int], classes: int) -> NDArray[np.int64]:
    """Return the category id of each class: of two the one in use, -1 where the file has none."""
    found = np.full(classes, -1, np.int64)
    for category in sorted(numbers, key=lambda category: category in used):
        found[numbers[category]] = category
    return found


def find_file(folder: Path) -> Path | None:
    """Return the JSON to train on in a folder of COCO's layout or Roboflow's, if it is one.

    Boxes are in COCO's own `instances_*.json`; its captions and keypoints are of the same images.

    Raises:
        DataError: There are some, but which to train on cannot be told.
    """
    places = ("annotations/*.json", "_annotations.coco.json", "*/_annotations.coco.json")
    listed = sorted(file for place in places for file in folder.glob(place))
    listed = [file for file in listed if not file.name.startswith(".")]
    found = [file for file in listed if file.stem.startswith("instances_")] or listed
    training = [file for file in found if _split_of(file) == "train"]
    if not training and len(found) == 1 and _split_of(found[0]) is None:
        training = found
    if found and len(training) != 1:
        shown = ", ".join(str(file.relative_to(folder)) for file in (training or found)[:4])
        raise DataError(
            f"data: {folder} holds {counted(len(found), 'COCO JSON')}, such as {shown}; "
            "give the JSON to train on"
        )
    return training[0] if training else None


def split_files(file: Path) -> dict[str, str]:
    """Find the other splits' JSON beside one of them, by the name of the file or its folder.

    A file without siblings is both train and val.
    """
    found = {role: str(path) for role in ROLES if (path := _sibling(file, ROLES[role]))}
    return {"train": str(file), "val": str(file)} | found


def _split_of(file: Path) -> str | None:
    """Return the word for a split in the name of a file or its folder; None without one."""
    found = SPLIT.search(file.stem) or FOLDER.fullmatch(file.parent.name)
    return found and found[1].lower()


def _sibling(file: Path, words: Sequence[str]) -> Path | None:
    """Return the file whose name, or folder, has one of `words` where `file` has its split."""
    for word in words:
        if SPLIT.search(file.stem):
            there = _called(file.parent, SPLIT.sub(word, file.name))
        elif FOLDER.fullmatch(file.parent.name):
            folder = _called(file.parent.parent, SPLIT.sub(word, file.parent.name))
            there = folder and _called(folder, file.name)
        else:
            return None
        if there is not None:
            return there
    return None


def _called(folder: Path, name: str) -> Path | None:
    """Return what lies in a folder under a name, whatever its capitals: CVAT writes `Train`."""
    exact = folder / name
    if exact.exists():
        return exact
    there = folder.iterdir() if folder.is_dir() else ()
    alike = (path for path in there if path.name.lower() == name.lower())
    return min(alike, default=None)


def _compare_sizes(images: Sequence[Record], sizes: np.ndarray, file: Path, labels: Labels) -> None:
    for image, (width, height) in zip(images, sizes.tolist(), strict=True):
        said = image.get("width"), image.get("height")
        if width and None not in said and said != (width, height):
            reason = (
                f"{image['file_name']}: says {said[0]} x {said[1]}, the image is {width} x {height}"
            )
            labels.defects.append(Defect(str(file), None, "size-mismatch", reason))


@dataclass(frozen=True, slots=True)
class Adder:
    """Adds annotations to `labels`, or writes down why not."""

    file: str
    rows: Mapping[int, int]  # image id -> row
    known: frozenset[int]  # ids of all images, also those not chosen
    numbers: Mapping[int, int]  # category id -> class
    labels: Labels

    def add(self, item: Any, place: int) -> None:
        """Add annotation number `place` of the file."""
        if not isinstance(item, dict):
            return self._refuse(place, "malformed-row", "is no object")
        image = item.get("image_id")
        if not _is_id(image) or image not in self.known:
            reason = f"image_id {image!r} is not among the images"
            return self._refuse(place, "unknown-image", reason)
        if image in self.rows:
            self._add(item, place, self.rows[image])
        return None

    def _add(self, item: Record, place: int, row: int) -> None:
        category, box, crowd = item.get("category_id"), item.get("bbox"), _flag(item.get("iscrowd"))
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return self._refuse(place, "malformed-row", f"bbox {box!r}; four numbers are needed")
        if not _is_id(category) or category not in self.numbers:
            listed = ", ".join(map(str, self.numbers))
            reason = f"category_id {category!r} is none of {listed}"
            return self._refuse(place, "class-range", reason)
        if crowd is None:
            reason = f"iscrowd {item['iscrowd']!r}; 0 or 1 is needed"
            return self._refuse(place, "malformed-row", reason)
        x, y, width, height = map(float, box)
        area = item.get("area")
        return self.labels.add(
            row,
            self.numbers[category],
            (x, y, x + width, y + height),
            crowd=crowd,
            area=float(area) if _is_number(area) else np.nan,
        )

    def _refuse(self, place: int, kind: str, reason: str) -> None:
        self.labels.defects.append(Defect(self.file, None, kind, f"annotations[{place}]: {reason}"))


def _is_id(value: Any) -> TypeGuard[int]:
    """Tell whether `value` is a whole number; 3.0 is, and equals 3 wherever it is looked up."""
    if isinstance(value, float):
        return value.is_integer() and abs(value) < 2**63
    return isinstance(value, int) and abs(value) < 2**63


def _flag(value: Any) -> bool | None:
    """Return what a flag says, however exporters write it; None for what is no flag."""
    if value is None or value in (0, "0"):
        return False
    return True if value in (1, "1") else None


def _is_number(value: Any) -> TypeGuard[float]:
    """Tell whether `value` is a number that a float can hold."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float)
