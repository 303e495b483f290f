"""COCO data sets: one JSON file per split, boxes as x, y, width, height in pixels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from visiontrain.core.errors import DataError
from visiontrain.data.build import Labels, build
from visiontrain.data.description import Choice, Description, unique_names
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Defect, Table

KEYS = ("path", "train", "val", "validation", "test", "images", "names", "nc")
ROLES = {"train": ("train",), "val": ("validation", "valid", "val"), "test": ("test",)}


class CocoReader:
    """COCO JSON files of the splits, and the folders their `file_name`s are relative to."""

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
        self.names = description.names() or self._find_names()

    def read(self, split: str, choice: Choice) -> Table:
        """Read the annotations of `split`; category ids become positions in `names`."""
        file = self.splits[split]
        content = load(file)
        images = self._unique(content["images"], file)
        if not images:
            raise DataError(f"{file}: images: none listed; add some")
        chosen = [images[row] for row in choice.rows(len(images))]
        folder = self._folder(split, file, str(chosen[0]["file_name"]))
        source = FileImages(
            Paths(folder / str(image["file_name"]) for image in chosen), self.description.max_pixels
        )
        seen = scan(source.paths, source.max_pixels, self.description.cache)
        labels = Labels()
        _compare_sizes(chosen, seen.sizes, file, labels)
        rows = {image["id"]: row for row, image in enumerate(chosen)}
        known = frozenset(image["id"] for image in images)
        adder = Adder(str(file), rows, known, self._numbers(content["categories"]), labels)
        for place, item in enumerate(content["annotations"]):
            adder.add(item, place)
        return build(self.names, source, seen, labels, lambda row: f"{file} ({source.name(row)})")

    def _one(self, split: str, entries: Sequence[str]) -> Path:
        if len(entries) != 1:
            raise self.description.fail(split, f"{len(entries)} files", "give one COCO JSON")
        place = self.root / entries[0]
        return place if place.exists() else self.description.locate(split, entries[0])

    def _find_names(self) -> tuple[str, ...]:
        """Take the categories of the first split, by id."""
        file = next(iter(self.splits.values()))
        categories = load(file)["categories"]
        if not categories:
            raise DataError(f"{file}: categories: none; add some")
        ordered = sorted(categories, key=lambda category: category["id"])
        return unique_names([str(category["name"]) for category in ordered], str(file))

    def _numbers(self, categories: Sequence[Mapping[str, Any]]) -> dict[int, int]:
        """Map category ids to positions in `names`; by name, so that files may number apart."""
        places = {name: place for place, name in enumerate(self.names)}
        return {
            category["id"]: places[str(category["name"])]
            for category in categories
            if str(category["name"]) in places
        }

    def _unique(self, images: Sequence[Mapping[str, Any]], file: Path) -> list[Mapping[str, Any]]:
        """Refuse two images of one id: their boxes could not be told apart."""
        seen: set[Any] = set()
        for image in images:
            if image["id"] in seen:
                raise DataError(f"{file}: images: two have id {image['id']}; number them apart")
            seen.add(image["id"])
        return list(images)

    def _folder(self, split: str, file: Path, first: str) -> Path:
        """Find the folder of the images: as the YAML says, or where the first one is."""
        said = self.folders if isinstance(self.folders, str) else self.folders.get(split)
        if said is not None:
            return self.root / said
        year = re.sub(r"^(instances|annotations?)_", "", file.stem)  # instances_val2017
        guesses = [
            file.parent,
            file.parent / "images",
            *(base / name for base in (file.parent.parent, self.root) for name in (year, split)),
            *(file.parent.parent / "images" / name for name in (year, split, "")),
        ]
        for folder in guesses:
            if (folder / first).is_file():
                return folder
        listed = ", ".join(dict.fromkeys(str(folder) for folder in guesses))
        raise DataError(
            f"{file}: no {first} in {listed}; say where the images are: `images: {{{split}: ...}}` "
            "in a YAML with `format: coco`"
        )


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
            if not _is_record(entry, fields):
                raise DataError(f"{file}: {key}[{place}]: needs {' and '.join(fields)}")
    return content


def _is_record(entry: Any, fields: Sequence[str]) -> bool:
    """Tell whether `entry` has a usable id and a text in the other fields."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), int)
        and all(isinstance(entry.get(field), int | str) for field in fields)
    )


def split_files(file: Path) -> dict[str, str]:
    """Find the other splits' JSON beside one of them, by the name of the file or its folder.

    A file without siblings is both train and val.
    """
    found = {role: str(path) for role in ROLES if (path := _sibling(file, ROLES[role]))}
    return {"train": str(file), "val": str(file)} | found


def _sibling(file: Path, words: Sequence[str]) -> Path | None:
    """Return the file whose name, or folder, has one of `words` where `file` has its split."""
    pattern = r"(?<![a-z])(train|validation|valid|val|test)(?=\d*(?![a-z]))"
    for word in words:
        if re.search(pattern, file.stem):
            candidate = file.with_stem(re.sub(pattern, word, file.stem))
        elif re.fullmatch(rf"{pattern}\d*", file.parent.name):
            folder = re.sub(pattern, word, file.parent.name)
            candidate = file.parent.with_name(folder) / file.name
        else:
            return None
        if candidate.is_file():
            return candidate
    return None


def _compare_sizes(
    images: Sequence[Mapping[str, Any]], sizes: np.ndarray, file: Path, labels: Labels
) -> None:
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
        image, category, box = (item.get(key) for key in ("image_id", "category_id", "bbox"))
        if not isinstance(image, int) or image not in self.known:
            reason = f"image_id {image!r} is not among the images"
            return self._refuse(place, "unknown-image", reason)
        if image not in self.rows:
            return None
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            return self._refuse(place, "malformed-row", f"bbox {box!r}; four numbers are needed")
        if not isinstance(category, int) or category not in self.numbers:
            listed = ", ".join(map(str, self.numbers))
            reason = f"category_id {category!r} is none of {listed}"
            return self._refuse(place, "class-range", reason)
        x, y, width, height = map(float, box)
        area = item.get("area")
        return self.labels.add(
            self.rows[image],
            self.numbers[category],
            (x, y, x + width, y + height),
            crowd=bool(item.get("iscrowd", 0)),
            area=float(area) if _is_number(area) else np.nan,
        )

    def _refuse(self, place: int, kind: str, reason: str) -> None:
        self.labels.defects.append(Defect(self.file, None, kind, f"annotations[{place}]: {reason}"))


def _is_number(value: Any) -> TypeGuard[float]:
    """Tell whether `value` is a number that a float can hold."""
    if isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, float)
