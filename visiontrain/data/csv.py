"""Labels as a CSV file: a row per image, with one class, several, or a column for each."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from visiontrain.core.errors import DataError
from visiontrain.data.build import build_labelled
from visiontrain.data.defects import counted
from visiontrain.data.description import SPLITS, Choice, Description, unique_names
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Defect, Table

KEYS = ("path", *SPLITS, "validation", "names", "several")
IMAGE = ("image", "path", "file", "filename", "file_name", "image_path")
LABEL = ("label", "labels", "class", "classes", "category")
BETWEEN = "|"  # labels of one image
YES, NO = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no", ""}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a file."""

    line: int  # 1-based, of the file: where it begins
    image: str
    labels: tuple[str, ...]
    marked: bool = False  # by 0 or 1 in a column for each class


class CsvReader:
    """CSV files `image,label`; several labels stand as `cat|dog`, or have a column of 0 and 1 each.

    Images are relative to the file, or to `path`. Their defects are told with the line that names
    them, but for those that only decoding finds.
    """

    task = "classify"

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        self.description, self.wanted = description, description.names()
        self.root = description.root()
        self.splits: Mapping[str, Any] = {
            split: [self._file(split, entry) for entry in entries]
            for split, entries in description.sources().items()
        }
        first = next(iter(self.splits.values()))
        self._rows = {path: read_rows(path, self.wanted) for path in first}
        rows = [row for path in first for row in self._rows[path]]
        labels = {label for row in rows for label in row.labels}
        labels |= {label for path in first for label in _columns(path)}  # also those of no image
        listed = self.wanted or unique_names(sorted(labels), description.where)
        if len(listed) < 1:
            raise DataError(f"{first[0]}: no label in {counted(len(rows), 'row')}; add some")
        self.names = listed
        self.several = self._several(rows)
        files = dict.fromkeys(path for paths in self.splits.values() for path in paths)
        notes = (_left_out(path, self.wanted) for path in files)
        joined = _joined(first[0], labels)
        self.notes = tuple(note for note in (*notes, joined) if note)

    def read(self, split: str, choice: Choice) -> Table:
        """Look up the images of `split`, and look at each one's header."""
        rows = [(path, row) for path in self.splits[split] for row in self._of(path)]
        if not rows:
            raise DataError(f"{self.splits[split][0]}: no row; write image,label in each")
        defects: list[Defect] = []
        rows, places = self._each_once(rows, defects)
        picked = choice.rows(len(rows))
        chosen, places = [rows[k] for k in picked], [places[k] for k in picked]
        images = FileImages(Paths(places), self.description.max_pixels)
        seen = scan(images.paths, images.max_pixels, self.description.cache)
        seen = replace(seen, defects=tuple(_placed(seen.defects, places, chosen)))
        number = {name: label for label, name in enumerate(self.names)}
        labels: list[tuple[int, int]] = []
        dropped: set[int] = set()
        for k, (path, row) in enumerate(chosen):
            reason = self._wrong(row, number)
            if reason:
                defects.append(Defect(str(path), row.line, *reason))
                dropped.add(k)
            else:
                labels += [(k, number[label]) for label in row.labels]
        return build_labelled(
            self.names, images, seen, labels, dropped, defects, several=self.several
        )

    def _each_once(
        self, rows: Sequence[tuple[Path, Row]], defects: list[Defect]
    ) -> tuple[list[tuple[Path, Row]], list[str]]:
        """Join the rows of an image that may have several labels; else its first class counts.

        Rows that give it that class again stay: it may be meant to be seen more often.

        Returns:
            The rows that are left, and where the image of each lies.
        """
        found: list[tuple[Path, Row]] = []
        places: list[str] = []
        first: dict[str, int] = {}
        for path, row in rows:
            place = self._image(path, row.image)
            known = first.setdefault(place, len(found))
            if known == len(found):
                found.append((path, row))
                places.append(place)
                continue
            file, before = found[known]
            if self.several:
                labels = tuple(dict.fromkeys((*before.labels, *row.labels)))
                found[known] = file, replace(before, labels=labels)
            elif row.labels == before.labels:
                found.append((path, row))
                places.append(place)
            else:
                reason = f"{row.image} is of another class in {file}:{before.line}; "
                reason += "`several: true` lets images have several"
                defects.append(Defect(str(path), row.line, "repeated-row", reason))
        return found, places

    def _several(self, rows: Sequence[Row]) -> bool:
        """Tell whether an image may have any number of labels.

        One blank label among many is a slip; a row of columns that are all 0 was meant.
        """
        said = self.description.values.get("several")
        if said is not None and not isinstance(said, bool):
            raise self.description.fail("several", f"got {said!r}", "give true or false")
        if said is not None:
            return said
        return any(len(row.labels) > 1 or (row.marked and not row.labels) for row in rows)

    def _wrong(self, row: Row, number: Mapping[str, int]) -> tuple[str, str] | None:
        """Return the kind and the reason of a defect, if a row cannot be used."""
        for label in row.labels:
            if label not in number:
                listed = ", ".join(list(number)[:20])
                return "class-range", f"class {label!r} is none of {listed}"
        if not self.several and not row.labels:
            return "malformed-row", "no label; `several: true` lets images have none"
        if not self.several and len(row.labels) > 1:
            return "malformed-row", f"{counted(len(row.labels), 'label')}, where others have one"
        return None

    def _of(self, path: Path) -> list[Row]:
        if path not in self._rows:
            self._rows[path] = read_rows(path, self.wanted)
        return self._rows[path]

    def _file(self, split: str, entry: str) -> Path:
        path = self.root / entry
        if not path.is_file():
            raise DataError(f"{self.description.where}: {split}: no file {path}; correct the path")
        return path

    def _image(self, file: Path, name: str) -> str:
        beside = file.parent / name
        # Not with Path's exists, which raises at a name that is too long.
        there = file.parent == self.root or os.path.exists(beside)  # noqa: PTH110
        return os.path.abspath(beside if there else self.root / name)  # noqa: PTH100


def _placed(
    defects: Sequence[Defect], places: Sequence[str], rows: Sequence[tuple[Path, Row]]
) -> Iterator[Defect]:
    """Say of defects of images, in the order of `places`, which line names each image."""
    named = zip(places, rows, strict=True)
    for defect in defects:
        path, row = next(row for place, row in named if place == defect.file)
        yield Defect(str(path), row.line, defect.kind, f"{defect.file}: {defect.reason}")


def _joined(path: Path, labels: Collection[str]) -> str:
    """Name a class that seems to be several others, put together by something else than `|`."""
    for label in sorted(labels):
        parts = [part for part in re.split(r"[,; ]+", label) if part]
        if len(parts) > 1 and set(parts) <= set(labels):
            return f"{path}: a class {label!r} beside {parts[0]!r}; write several labels as cat|dog"
    return ""


def _left_out(path: Path, names: Sequence[str] | None) -> str:
    """Name the columns of a file that are not read, if there are some."""
    head = _head_of(path)
    read = {head.image, *((head.label,) if head.label is not None else head.classes(names))}
    others = [name for k, name in enumerate(head.names) if k not in read and name]
    return f"{path}: columns left out: {', '.join(others)}" if others else ""


def _columns(path: Path) -> list[str]:
    """Return the classes that have a column each, in which something stands."""
    head = _head_of(path)
    if head.label is not None:
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [cells for _, cells in _cells(path, file) if cells][1:]
    return [head.names[k] for k in head.classes(None) if any(cells[k].strip() for cells in rows)]


def _head_of(path: Path) -> Head:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _head(_cells(path, file))
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True, slots=True)
class Head:
    """The first line of a file: which column is what."""

    names: Sequence[str]
    image: int | None
    label: int | None

    def classes(self, wanted: Sequence[str] | None) -> list[int]:
        """Return the columns of classes, where each has one: those `wanted`, or all named ones."""
        named = (k for k, name in enumerate(self.names) if name and k != self.image)
        return [k for k in named if wanted is None or self.names[k] in wanted]


def _head(lines: Iterator[tuple[int, list[str]]]) -> Head:
    names = [name.strip() for name in next(lines, (1, []))[1]]
    return Head(names, _column(names, IMAGE), _column(names, LABEL))


def read_rows(path: Path, names: Sequence[str] | None = None) -> list[Row]:
    """Read a CSV file.

    Args:
        path: it.
        names: of the classes, if they are known: of columns for each class, others are left out.

    Raises:
        DataError: it cannot be read, or its first line names no images.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = _cells(path, file)
            head = _head(lines)
            classes = head.classes(names)
            if head.image is None or (head.label is None and not classes):
                raise DataError(
                    f"{path}:1: columns {', '.join(head.names) or 'none'}; name one image and one "
                    "label, or one for each class"
                )
            lacking = [name for name in names or () if name not in head.names]
            if head.label is None and lacking:
                raise DataError(
                    f"{path}:1: no column {lacking[0]!r}, which `names:` lists; there are "
                    f"{', '.join(filter(None, head.names))}"
                )
            return [_row(path, line, head, cells, classes) for line, cells in lines if cells]
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: cannot be read ({error}); give a CSV file in UTF-8")


def _cells(path: Path, file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each row begins, and its cells.

    Raises:
        DataError: a quote is not closed, or a cell is longer than any text.
    """
    reader = csv.reader(file, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: no row of a CSV file ({error}); close its quotes, and double "
                "those inside a text"
            ) from error
        yield line, cells


def _column(head: Sequence[str], names: Sequence[str]) -> int | None:
    return next((k for k, name in enumerate(head) if name.lower() in names), None)


def _row(path: Path, line: int, head: Head, cells: Sequence[str], classes: Sequence[int]) -> Row:
    if len(cells) != len(head.names):
        raise DataError(
            f"{path}:{line}: {counted(len(cells), 'column')}, but the first line has "
            f"{len(head.names)}; quote texts that hold a comma"
        )
    image = cells[head.image or 0].strip()
    if head.label is not None:
        parts = [part.strip() for part in cells[head.label].split(BETWEEN)]
        return Row(line, image, tuple(dict.fromkeys(p for p in parts if p)))
    named = []
    for k in classes:
        value = cells[k].strip().lower()
        if value in YES:
            named.append(head.names[k])
        elif value not in NO:
            raise DataError(
                f"{path}:{line}: {head.names[k]}: got {cells[k]!r}; give 0 or 1, call the column "
                f"of classes `label`, or list the columns that are classes under names:"
            )
    return Row(line, image, tuple(named), marked=True)
