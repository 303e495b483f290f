"""The same pictures with what each mode finds on them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontrain.core.types import ClassScores, Detections, Prediction
from visiontrain.data.defects import counted, printable
from visiontrain.data.table import Table
from visiontrain.report.pictures import CONFIDENCE, Picture, cell, readable

Pixels = NDArray[np.uint8]
Predict = Callable[[Pixels], Prediction]


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture as one mode sees it."""

    mode: str  # or "labels"
    text: str
    url: str  # a data URL


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture, seen by all."""

    title: str
    shots: Sequence[Shot]


def samples(table: Table, modes: Mapping[str, Predict], images: int = 4) -> list[Sample]:
    """Let every mode look at a few images of a split.

    Args:
        table: the split; images are taken at even distances.
        modes: by name, what finds objects or classes.
        images: how many.
    """
    found = []
    for row, pixels in readable(table, images):
        shots = [Shot("labels", _truth(table, row), _url(_labelled(table, row, pixels), table))]
        for name, predict in modes.items():
            shots.append(_shot(name, pixels, predict(pixels), table))
        found.append(Sample(printable(PurePath(table.images.name(row)).name), shots))
    return found


def _truth(table: Table, row: int) -> str:
    own = table.classes[table.rows(row)]
    if table.task == "classify":
        return ", ".join(table.names[int(label)] for label in own) or "none"
    return counted(len(own), "box")


def _labelled(table: Table, row: int, pixels: Pixels) -> Picture:
    own = table.rows(row) if table.task == "detect" else slice(0, 0)
    return Picture(pixels, table.boxes[own], table.classes[own], None, "")


def _shot(name: str, pixels: Pixels, found: Prediction, table: Table) -> Shot:
    none = np.zeros((0, 4))
    if isinstance(found, ClassScores):
        text = ", ".join(f"{what} {score:.2f}" for what, score in found.top(2))
        plain = Picture(pixels, none, np.zeros(0, np.int64), None, "")
        return Shot(name, text, _url(plain, table))
    assert isinstance(found, Detections)
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
    return Shot(name, text, _url(picture, table))


def _url(picture: Picture, table: Table) -> str:
    data = io.BytesIO()
    drawn: Image.Image = cell(picture, table.names)
    drawn.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
