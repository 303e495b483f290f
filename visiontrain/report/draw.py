"""Boxes on pictures: one colour per class, readable at any size."""

from __future__ import annotations

import colorsys
import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visiontrain.core.types import Detections, Prediction

Colour = tuple[int, int, int]  # red, green, blue
GOLDEN = 0.618033988749895  # turns of hue: any number of neighbours stay well apart


def colour_of(label: int) -> Colour:
    """Return the colour of class `label`: always the same one, whatever the data set."""
    hue = (0.58 + label * GOLDEN) % 1
    value = (0.95, 0.75)[label // 5 % 2]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw(pixels: NDArray[np.uint8], found: Prediction, names: Sequence[str]) -> NDArray[np.uint8]:
    """Return a copy of `pixels` (H, W, 3) RGB with what was found written on it."""
    if isinstance(found, Detections):
        return draw_boxes(pixels, found, names)
    picture = Image.fromarray(pixels)
    pen, font = ImageDraw.Draw(picture), font_of(max(10, round(min(picture.size) / 20)))
    height = sum(font.getmetrics())
    for k, (name, score) in enumerate(found.likely(3)):
        colour = colour_of(names.index(name))
        _label(pen, (0, (k + 1) * height), f"{name} {score:.2f}", font, colour)
    return np.asarray(picture)


def draw_boxes(
    pixels: NDArray[np.uint8], found: Detections, names: Sequence[str]
) -> NDArray[np.uint8]:
    """Return a copy of `pixels` (H, W, 3) RGB with boxes, class names and scores on it."""
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    side = (picture.width * picture.height) ** 0.5
    thickness, font = max(1, round(side / 320)), font_of(max(10, round(side / 45)))
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.classes.tolist(), strict=True)
    for box, score, label in reversed(list(rows)):  # the best ones last: on top
        colour = colour_of(label)
        left, top, right, bottom = (round(value) for value in box)
        pen.rectangle((left, top, max(left, right), max(top, bottom)), None, colour, thickness)
        _label(pen, (left, top), f"{names[label]} {score:.2f}", font, colour)
    return np.asarray(picture)


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Return the typeface that matplotlib ships, which knows most scripts."""
    found = importlib.util.find_spec("matplotlib")  # not imported: that takes long
    folder = Path(found.origin).parent if found and found.origin else Path()
    return ImageFont.truetype(folder / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)


def _label(
    pen: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: Colour,
) -> None:
    """Write `text` above `corner`, or below it where the picture ends."""
    _, _, width, _ = (round(value) for value in font.getbbox(text))
    height = sum(font.getmetrics())
    picture = pen.im.size
    left = max(0, min(corner[0], picture[0] - width - 4))
    top = corner[1] - height if corner[1] >= height else corner[1]
    pen.rectangle((left, top, left + width + 4, top + height), fill=colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140  # luma of ITU-R BT.601
    pen.text((left + 2, top), text, (255, 255, 255) if dark else (0, 0, 0), font)
