"""Pascal VOC data sets: one XML file per image, lists of ids per split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from visiontrain.core.errors import DataError
from visiontrain.data.build import Labels, build
from visiontrain.data.description import Choice, Description, lines_of, unique_names
from visiontrain.data.header import SUFFIXES
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Defect, Table
from visiontrain.data.walk import walk

KEYS = ("path", "train", "val", "validation", "test", "names", "nc")
FOLDERS = ("Annotations", "JPEGImages", "ImageSets/Main")


def is_root(folder: Path) -> bool:
    """Tell whether a folder has VOC's layout."""
    return all((folder / name).is_dir() for name in FOLDERS)


LISTS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}


class VocReader:
    """A root of VOC's layout, or several: splits name lists such as `VOC2007/trainval`."""

    task = "detect"
    several = False
    notes: tuple[str, ...] = ()

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        self.description = description
        self.root = description.root()
        self.splits: Mapping[str, Any]
        if any(key in description.values for key in KEYS[1:5]):
            self.splits = description.sources()
        else:
            self.splits = self._found()
        self.names = description.names() or self._find_names()

    def _found(self) -> dict[str, list[str]]:
        """Return the lists called as a split is, whatever their capitals: CVAT writes `Train`."""
        there = sorted(path.stem for path in (self.root / FOLDERS[2]).glob("*.txt"))
        by_name = {name.lower(): name for name in there}
        lists = {
            split: [by_name[name]]
            for split, names in LISTS.items()
            for name in names
            if name in by_name
        }
        if not lists:
            raise DataError(
                f"{self.description.where}: no train.txt in {self.root / FOLDERS[2]}; there are: "
                f"{', '.join(there) or 'none'}; name them in a YAML, as in train: NAME"
            )
        return lists

    def read(self, split: str, choice: Choice) -> Table:
        """Read the annotations of the images listed for `split`."""
        listed = [pair for entry in self.splits[split] for pair in self._list(split, entry)]
        if not listed:
            raise DataError(f"{self.description.where}: {split}: the list is empty; add image ids")
        chosen = [listed[row] for row in choice.rows(len(listed))]
        images = FileImages(Paths(image for image, _ in chosen), self.description.max_pixels)
        files = Paths(annotation for _, annotation in chosen)
        seen = scan(images.paths, images.max_pixels, self.description.cache)
        labels = Labels()
        numbers = {name: number for number, name in enumerate(self.names)}
        for row, file in enumerate(files):
            if seen.usable[row]:
                width, height = seen.sizes[row].tolist()
                read_annotation(file, row, (width, height), numbers, labels)
        return build(
            self.names,
            images,
            seen,
            labels,
            files.__getitem__,
            single_cls=self.description.single_cls,
        )

    def _list(self, split: str, entry: str) -> list[tuple[str, str]]:
        """Return image and annotation of every id in one list."""
        root, name = (self.root / entry).parent, Path(entry).name
        if not is_root(root):
            folders = ", ".join(FOLDERS)
            raise DataError(
                f"{self.description.where}: {split}: {root} lacks one of {folders}; "
                "see datasets/README.md"
            )
        file = root / FOLDERS[2] / f"{name}.txt"
        if not file.is_file():
            there = ", ".join(sorted(path.stem for path in file.parent.glob("*.txt")))
            raise DataError(f"{self.description.where}: {split}: no {file}; there are: {there}")
        lines = lines_of(file)
        pictures = _pictures(root / FOLDERS[1])
        ids = [_id(line.strip(), pictures) for line in lines if line.strip()]
        annotations = root / FOLDERS[0]
        return [
            (
                str(root / FOLDERS[1] / pictures.get(id_, f"{id_}.jpg")),
                str(annotations / f"{id_}.xml"),
            )
            for id_ in ids
        ]

    def _find_names(self) -> tuple[str, ...]:
        """Collect the class names in the annotations of all splits, sorted."""
        found: set[str] = set()
        for split, entries in self.splits.items():
            with suppress(DataError):  # told when the split itself is read
                for entry in entries:
                    for _, file in self._list(split, entry):
                        found |= _names_in(file)
        if not found:
            raise DataError(
                f"{self.description.where}: no object in any annotation; check the splits"
            )
        return unique_names(sorted(found), self.description.where)


def _pictures(folder: Path) -> dict[str, str]:
    """Map ids to image files: the suffix need not be .jpg."""
    names = sorted(os.path.relpath(path, folder) for path in walk(folder))
    pairs = [os.path.splitext(name) for name in names]  # noqa: PTH122
    return {stem: stem + suffix for stem, suffix in pairs if suffix.lower() in SUFFIXES}


def _id(line: str, pictures: Mapping[str, str]) -> str:
    """Return which image a line of a list means.

    Usually an id alone, which may hold spaces; some tools write the file's name, and VOC's lists
    of single classes have a second column.
    """
    first, *_ = line.split()
    candidates = (line, _without_suffix(line), first, _without_suffix(first))
    return next((found for found in candidates if found in pictures), candidates[-1])


def _without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)  # noqa: PTH122
    return stem if suffix.lower() in SUFFIXES else name


def _names_in(file: str) -> set[str]:
    try:
        names = {_text(item, "name") for item in parse(file).iter("object")}
    except (OSError, ValueError):
        return set()  # becomes a defect when the split is read
    return names - {""}  # likewise


def parse(file: str) -> ElementTree.Element:
    """Parse an annotation; document types and entities, which could expand, are refused.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no plain XML.
    """
    data = Path(file).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    # As text, so that a declared encoding cannot hide what is looked for here.
    if "\0" in text or "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("has a document type, an entity or a zero byte")
    try:
        return ElementTree.fromstring(text)  # noqa: S314 - nothing can expand, see above
    except ElementTree.ParseError as error:
        raise ValueError(f"is no XML ({error})") from error


def read_annotation(
    file: str, image: int, size: tuple[int, int], numbers: dict[str, int], labels: Labels
) -> None:
    """Add the objects of an annotation; what cannot be used becomes a defect."""
    try:
        root = parse(file)
    except FileNotFoundError:
        return  # an image without an annotation is background, as in YOLO's layout
    except (OSError, ValueError) as error:
        labels.dropped.add(image)
        labels.defects.append(Defect(file, None, "unreadable-labels", str(error)))
        return
    said = [_number(root, f"size/{side}") for side in ("width", "height")]
    if all(said) and tuple(said) != size:
        reason = f"says {said[0]:g} x {said[1]:g}, the image is {size[0]} x {size[1]}"
        labels.defects.append(Defect(file, None, "size-mismatch", reason))
    for place, item in enumerate(root.findall("object"), 1):
        _add_object(item, place, file, image, numbers, labels)


def _add_object(
    item: ElementTree.Element,
    place: int,
    file: str,
    image: int,
    numbers: dict[str, int],
    labels: Labels,
) -> None:
    name = _text(item, "name")
    if not name:
        labels.defects.append(Defect(file, None, "malformed-row", f"object {place}: no name"))
        return
    corners = [_number(item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
    match corners:
        case [float(x1), float(y1), float(x2), float(y2)]:
            # VOC counts pixels from 1 and includes the last one. A box of one pixel's width is
            # a slip of the mouse, so it is left without area, to be dropped.
            box = (x1 - (x1 != x2), y1 - (y1 != y2), x2, y2)
        case _:
            reason = f"object {place} ({name}): no complete bndbox"
            labels.defects.append(Defect(file, None, "malformed-row", reason))
            return
    if name not in numbers:
        listed = ", ".join(numbers)
        reason = f"object {place}: class {name!r} is none of {listed}"
        labels.defects.append(Defect(file, None, "class-range", reason))
        return
    difficult = _text(item, "difficult") == "1"
    labels.add(image, numbers[name], box, difficult=difficult)


def _text(item: ElementTree.Element, path: str) -> str:
    return (item.findtext(path) or "").strip()


def _number(item: ElementTree.Element, path: str) -> float | None:
    try:
        return float(_text(item, path))
    except ValueError:
        return None
