"""The same pictures with what each mode finds on them."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontrain.core.errors import VisiontrainError
from visiontrain.core.types import ClassScores, Detections, Prediction
from visiontrain.data.defects import counted, printable
from visiontrain.data.table import Table
from visiontrain.report.pictures import CONFIDENCE, Picture, cell, readable

Pixels = NDArray[np.uint8]
Predict = Callable[[Pixels], Prediction]
LONGEST = 200  # letters of why there is no picture
FAULTS = (VisiontrainError, OSError, ValueError, RuntimeError, LookupError)  # cost one picture
_warn = logging.getLogger(__name__).warning


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture as one mode sees it."""

    mode: str  # or "labels"
    text: str
    url: str  # a data URL; empty where it could not be made


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture, seen by all."""

    title: str
    shots: Sequence[Shot]


def samples(
    table: Table, modes: Mapping[str, Callable[[], Predict]], images: int = 4
) -> list[Sample]:
    """Let every mode look at a few images of a split, one mode after another.

    A picture that cannot be made costs a warning, and says so where it would stand.

    Args:
        table: the split; images are taken at even distances.
        modes: by name, what loads that which finds objects or classes; dropped before the next.
        images: how many.
    """
    chosen = list(readable(table, images))
    shots = [
        [_tried("labels", lambda row=row, pixels=pixels: _labels(table, row, pixels))]
        for row, pixels in chosen
    ]
    for name, load in modes.items():
        for own, shot in zip(shots, _seen(name, load, [p for _, p in chosen], table), strict=True):
            own.append(shot)
    titles = [printable(PurePath(table.images.name(row)).name) for row, _ in chosen]
    return [Sample(title, own) for title, own in zip(titles, shots, strict=True)]


def _seen(
    name: str, load: Callable[[], Predict], chosen: Sequence[Pixels], table: Table
) -> list[Shot]:
    """Return the pictures as one mode sees them, which is loaded for that long."""
    try:
        predict = load()
    except FAULTS as error:
        return [_lost(name, error)] * len(chosen)
    return [
        _tried(name, lambda pixels=pixels: _shot(name, pixels, predict(pixels), table.names))
        for pixels in chosen
    ]


def _tried(name: str, make: Callable[[], Shot]) -> Shot:
    try:
        return make()
    except FAULTS as error:
        return _lost(name, error)


def _lost(name: str, error: Exception) -> Shot:
    why = shorten(f"{type(error).__name__}: {error}", LONGEST)
    _warn("pictures: %s: %s; report.html is complete without them", name, why)
    return Shot(name, f"no picture: {why}", "")


def _labels(table: Table, row: int, pixels: Pixels) -> Shot:
    picture = _labelled(table, row, pixels)
    return Shot("labels", _truth(table, row), _url(picture, table.names))


def _truth(table: Table, row: int) -> str:
    own = table.classes[table.rows(row)]
    if table.task == "classify":
        return ", ".join(table.names[int(label)] for label in own) or "none"
    return counted(len(own), "box")


def _labelled(table: Table, row: int, pixels: Pixels) -> Picture:
    own = table.rows(row) if table.task == "detect" else slice(0, 0)
    return Picture(pixels, table.boxes[own], table.classes[own], None, "")


def _shot(name: str, pixels: Pixels, found: Prediction, names: Sequence[str]) -> Shot:
    none = np.zeros((0, 4))
    if isinstance(found, ClassScores):
        text = ", ".join(f"{what} {score:.2f}" for what, score in found.top(2))
        plain = Picture(pixels, none, np.zeros(0, np.int64), None, "")
        return Shot(name, text, _url(plain, names))
    assert isinstance(found, Detections)
    # Those of the weights, which need not be the data set's.
    own = {int(label): name for label, name in zip(found.classes, found.names, strict=False)}
    kept = found.scores > CONFIDENCE
    picture = Picture(
        pixels,
        found.boxes[kept].double().numpy(),
        found.classes[kept].numpy(),
        found.scores[kept].double().numpy(),
        "",
    )
    text = counted(int(kept.sum()), "box")
    if not len(picture.boxes) and len(found.scores):
        text = f"nothing above {CONFIDENCE}, best {float(found.scores.max()):.2g}"
    return Shot(name, text, _url(picture, own or names))


def _url(picture: Picture, names: Sequence[str] | Mapping[int, str]) -> str:
    data = io.BytesIO()
    drawn: Image.Image = cell(picture, names)
    drawn.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
