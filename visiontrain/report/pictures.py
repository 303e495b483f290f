"""Images beside what is known of them: the first batches, and predictions beside labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visiontrain.core.errors import DataError
from visiontrain.core.types import Batch
from visiontrain.data.defects import counted
from visiontrain.data.table import Table
from visiontrain.metrics.rows import BOX, CLASS, IMAGE_COLUMN, SCORE
from visiontrain.report.draw import Colour, colour_of, font_of
from visiontrain.report.figure import short

CELL, GAP, FONT = 400, 8, 13  # pixels
TITLE = 51  # letters above a cell
CONFIDENCE = 0.25  # predictions below are not drawn
PAPER, INK, GREY = (255, 255, 255), (31, 41, 51), (120, 130, 140)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with boxes on it."""

    pixels: NDArray[np.uint8]  # (H, W, 3) RGB
    boxes: NDArray[np.floating]  # (M, 4): x1, y1, x2, y2 in pixels of the image
    classes: NDArray[np.integer]  # (M,)
    scores: NDArray[np.floating] | None  # (M,); None for labels
    title: str


def batch_picture(
    batch: Batch, names: Sequence[str], path: Path, images: int = 16, *, whole: bool = False
) -> Path:
    """Draw the first `images` of a training batch, as the model sees them, to `path`.

    Args:
        batch: images and targets.
        names: of the classes.
        path: where to.
        images: how many.
        whole: the targets are of whole images, and are named above them.
    """
    shown = [row for row in range(len(batch)) if float(batch.valid[row])][:images]
    pictures = [_of_batch(batch, row, names if whole else None) for row in shown]
    return save_sheet(grid(pictures, names, columns=4), path)


def _of_batch(batch: Batch, row: int, names: Sequence[str] | None) -> Picture:
    image = batch.images[row].detach().cpu()
    if image.dtype.is_floating_point:
        image = (image.float() * 255).round().clamp(0, 255).byte()
    targets = batch.targets[row].detach().cpu().double().numpy()
    targets = targets[targets[:, 0] >= 0]
    title = counted(len(targets), "box")
    if names is not None:
        shares: dict[int, float] = {}  # of two pictures of one class, it has what both have
        for k, *_, weight in targets.tolist():
            shares[int(k)] = shares.get(int(k), 0.0) + weight
        shown = [(short(names[k], 16), round(weight, 6)) for k, weight in shares.items()]
        mixed = [name if w == 1 else f"{name} {w:.2g}" for name, w in shown]
        title, targets = ", ".join(mixed), targets[:0]
    return Picture(
        pixels=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
        boxes=targets[:, 1:5],
        classes=targets[:, 0].astype(np.int64),
        scores=None,
        title=title,
    )


def predictions_picture(
    table: Table, rows: Tensor, path: Path, *, confidence: float = CONFIDENCE, images: int = 8
) -> Path:
    """Draw labels and, to the right of each, the detections scored above `confidence`.

    Args:
        table: the scored split; images are taken at even distances, unreadable ones left out.
        rows: detections (K, 7) as gathered.
        path: where to.
        confidence: least score drawn.
        images: how many.
    """
    found = rows.detach().cpu().numpy()
    pictures: list[Picture] = []
    for row, pixels in readable(table, images):
        own = found[found[:, IMAGE_COLUMN] == row]
        pictures += [_labels(table, row, pixels), _predictions(own, pixels, confidence)]
    return save_sheet(grid(pictures, table.names, columns=4), path)


def readable(table: Table, images: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield `images` rows at even distances with their pixels, in the order of the table."""
    for row in np.unique(np.linspace(0, len(table) - 1, min(images, len(table))).astype(int)):
        try:
            yield int(row), table.images.read(int(row))
        except DataError:
            continue  # named and counted where the split was loaded


def _labels(table: Table, row: int, pixels: NDArray[np.uint8]) -> Picture:
    own = table.rows(row)
    name = Path(table.images.name(row)).name
    return Picture(pixels, table.boxes[own], table.classes[own], None, f"label: {name}")


def _predictions(
    found: NDArray[np.float64], pixels: NDArray[np.uint8], confidence: float
) -> Picture:
    """Return an image with its detections (K, 7) above `confidence`; say how far it is from any."""
    shown = found[found[:, SCORE] > confidence]
    if len(shown) or not len(found):
        what = counted(len(shown), "box")
    else:
        what = f"nothing above {confidence}, best score {found[:, SCORE].max():.2g}"
    classes, scores = shown[:, CLASS].astype(np.int64), shown[:, SCORE]
    return Picture(pixels, shown[:, BOX], classes, scores, f"prediction: {what}")


def grid(pictures: Sequence[Picture], names: Sequence[str], columns: int) -> Image.Image:
    """Lay pictures out in cells of equal size, each under its title."""
    columns = max(1, min(columns, len(pictures)))
    lines = max(1, -(-len(pictures) // columns))
    font = font_of(FONT)
    head = sum(font.getmetrics()) + 4
    size = (columns * (CELL + GAP) + GAP, lines * (CELL + head + GAP) + GAP)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, picture in enumerate(pictures):
        left = GAP + number % columns * (CELL + GAP)
        top = GAP + number // columns * (CELL + head + GAP)
        pen.text((left, top), short(picture.title, TITLE), GREY, font)
        sheet.paste(cell(picture, names), (left, top + head))
    return sheet


def cell(picture: Picture, names: Sequence[str] | Mapping[int, str]) -> Image.Image:
    """Fit a picture into a cell and draw its boxes, the best ones on top."""
    height, width = picture.pixels.shape[:2]
    scale = CELL / max(height, width)
    fitted = Image.fromarray(picture.pixels).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR
    )
    pen = ImageDraw.Draw(fitted)
    scores = picture.scores if picture.scores is not None else np.zeros(len(picture.boxes))
    font = font_of(FONT if len(scores) <= 12 else FONT - 3)
    for number in np.argsort(scores, kind="stable"):
        label = int(picture.classes[number])
        text = short(names[label], 20)
        if picture.scores is not None:
            text = f"{text} {scores[number]:.2f}"
        left, top, right, bottom = (round(v) for v in (picture.boxes[number] * scale).tolist())
        corners = (left, top, max(left, right), max(top, bottom))
        _box(pen, corners, text, colour_of(label), font)
    cell = Image.new("RGB", (CELL, CELL), (238, 241, 244))
    cell.paste(fitted, ((CELL - fitted.width) // 2, (CELL - fitted.height) // 2))
    return cell


def _box(
    pen: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    text: str,
    colour: Colour,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Draw a box and its name above it, or inside where the picture ends."""
    pen.rectangle(corners, outline=colour, width=2)
    width, height = round(font.getlength(text)) + 4, sum(font.getmetrics())
    left = max(0, min(corners[0], pen.im.size[0] - width))
    top = corners[1] - height if corners[1] >= height else corners[1]
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    red, green, blue = colour
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 140  # luma of ITU-R BT.601
    pen.text((left + 2, top), text, PAPER if dark else INK, font)


def save_sheet(sheet: Image.Image, path: Path) -> Path:
    """Write a sheet of pictures to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, "PNG")
    return path
