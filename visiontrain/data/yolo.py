"""YOLO data sets: a text file of `class x y w h` rows beside each image."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontrain.core.errors import DataError
from visiontrain.data.build import Labels, build
from visiontrain.data.defects import counted
from visiontrain.data.description import Choice, Description, lines_of
from visiontrain.data.header import SUFFIXES
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import scan
from visiontrain.data.table import Defect, Table
from visiontrain.data.walk import walk

SCORED = 6  # columns of a box with a score, or with the number of a track
COLUMNS = "a box has 5, or 6 with a score, a polygon 7, 9, 11 ..."
KEYS = ("path", "train", "val", "validation", "test", "names", "nc", "kpt_shape")


class YoloReader:
    """A data.yaml as Ultralytics and Roboflow write it."""

    task = "detect"
    several = False
    notes: tuple[str, ...] = ()

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        names = description.names()
        if names is None:
            raise description.fail("names", "no class names", "add names: [...]")
        self.names = names
        self.description = description
        self.keypoints = self._keypoints()
        self.splits: Mapping[str, Any] = description.sources()
        self.root = description.root()

    def read(self, split: str, choice: Choice) -> Table:
        """Read the label rows; an image without a label file is background."""
        listed = [path for entry in self.splits[split] for path in self._images(split, entry)]
        if not listed:
            where = f"{self.description.where}: {split}"
            raise DataError(
                f"{where}: no image in {', '.join(self.splits[split])} under {self.root}; "
                f"looked for {', '.join(sorted(SUFFIXES))}"
            )
        chosen = [listed[row] for row in choice.rows(len(listed))]
        images = FileImages(Paths(chosen), self.description.max_pixels)
        seen = scan(images.paths, images.max_pixels, self.description.cache)
        labels = Labels()
        for row, path in enumerate(chosen):
            if seen.usable[row]:
                width, height = seen.sizes[row].tolist()
                read_rows(label_path(path), row, (width, height), labels, self.keypoints)
        return build(
            self.names,
            images,
            seen,
            labels,
            lambda row: label_path(images.name(row)),
            single_cls=self.description.single_cls,
        )

    def _keypoints(self) -> int:
        """Return how many numbers of a row are keypoints: `kpt_shape` is [points, 2 or 3]."""
        match self.description.values.get("kpt_shape"):
            case None:
                return 0
            case [int(points), 2 | 3 as numbers] if points > 0:
                return points * numbers
            case other:
                raise self.description.fail(
                    "kpt_shape", f"got {other!r}", "give [points, 2] or [points, 3]"
                )

    def _images(self, split: str, entry: str) -> list[str]:
        """List the images of a folder (walked), of a text list, or one image."""
        place = self._locate(split, entry)
        if place.is_dir():
            return list(walk(place))
        if place.suffix.lower() != ".txt":
            return [str(place)]
        lines = lines_of(place)
        return [self._listed(place, line.strip()) for line in lines if line.strip()]

    def _locate(self, split: str, entry: str) -> Path:
        """Find what a split names, also where Roboflow's `../train/images` goes one too far."""
        tried = [self.root / entry]
        if entry.startswith("../"):
            tried.append(self.root / entry[3:])
        if self.description.values.get("path") is None:
            tried += self.description.places(entry)
        for place in tried:
            if place.exists():
                return Path(os.path.abspath(place))  # noqa: PTH100 - resolve() would follow links
        listed = ", ".join(dict.fromkeys(map(str, tried)))
        raise DataError(
            f"{self.description.where}: {split}: nothing at {listed}; correct the path, or point "
            "$VISIONTRAIN_DATASETS at the folder that holds the data set"
        )

    def _listed(self, source: Path, line: str) -> str:
        """Return the image that a line of a text list means; `./` is relative to the list.

        CVAT puts its own folder `data/` before what it exports.
        """
        for text in (line, line.replace("\\", "/").removeprefix("data/")):
            places = [self.root / text, source.parent / text]
            for place in reversed(places) if line.startswith("./") else places:
                # Not with Path's exists, which raises at a name that is too long.
                if os.path.exists(place):  # noqa: PTH110
                    return str(place)
        return str(source.parent / line)


def label_path(image: str) -> str:
    """Return the label file of an image: the last folder `images` becomes `labels`."""
    folder, name = os.path.split(image)
    head, found, tail = f"{folder}{os.sep}".rpartition(f"{os.sep}images{os.sep}")
    if found:
        folder = f"{head}{os.sep}labels{os.sep}{tail}".rstrip(os.sep)
    return os.path.join(folder, os.path.splitext(name)[0] + ".txt")  # noqa: PTH118, PTH122


def read_rows(
    file: str, image: int, size: tuple[int, int], labels: Labels, keypoints: int = 0
) -> None:
    """Add the rows of a label file; what cannot be used becomes a defect of its line.

    Args:
        file: the label file; there may be none.
        image: row of the image it belongs to.
        size: width and height of the image.
        labels: what is added to.
        keypoints: how many numbers of keypoints may follow a box.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError) as error:
        labels.dropped.add(image)
        labels.defects.append(Defect(file, None, "unreadable-labels", f"cannot be read: {error}"))
        return
    rows = [(number, line, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    cut = any(len(fields) > SCORED for *_, fields in rows)  # beside polygons that is a part of one
    for number, line, fields in rows:
        if not fields:
            continue
        try:
            label, box = parse_row(fields, size, keypoints, scored=not cut)
        except ValueError as error:
            labels.defects.append(Defect(file, number, "malformed-row", f"{line[:60]!r}: {error}"))
            continue
        if label != int(label):
            labels.defects.append(
                Defect(file, number, "class-range", f"class {fields[0]} is no whole number")
            )
            continue
        labels.add(image, int(label), box, line=number)


def parse_row(
    fields: list[str], size: tuple[int, int], keypoints: int, *, scored: bool = True
) -> tuple[float, tuple[float, float, float, float]]:
    """Return the class and the box (x1, y1, x2, y2 in pixels) of a row.

    Five numbers are class and x, y, w, h relative to the image's size; a sixth is a score, as
    `predict` writes it, or the number of a track, unless `scored` is false. Seven or more, an odd
    number, are class and the corners of a polygon, which becomes the box around it. Where poses are
    labelled there are no polygons: a box may be followed by its keypoints, which are skipped.
    """
    if keypoints:
        if len(fields) not in (5, 5 + keypoints):
            raise ValueError(
                f"{counted(len(fields), 'column')}; a box has 5, a pose {5 + keypoints}"
            )
        fields = fields[:5]
    label, *numbers = map(float, fields)
    if not abs(label) < 2**31:
        raise ValueError("no class")
    width, height = size
    if len(numbers) == 4 or (len(numbers) == 5 and scored):
        x, y, w, h = numbers[:4]
        return label, (
            (x - w / 2) * width,
            (y - h / 2) * height,
            (x + w / 2) * width,
            (y + h / 2) * height,
        )
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[0::2], numbers[1::2]
        return label, (min(xs) * width, min(ys) * height, max(xs) * width, max(ys) * height)
    raise ValueError(f"{counted(len(fields), 'column')}; {COLUMNS}")
