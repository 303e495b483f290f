"""Predictions as files: predictions.json, COCO results, YOLO labels, pictures and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visiontrain.core.durable import replace_file, storing
from visiontrain.core.types import ClassScores, Detections, Prediction
from visiontrain.data.inputs import opencv_name
from visiontrain.report.draw import draw

DRAWABLE = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"))


def image_row(
    file_name: str, size: tuple[int, int], found: Prediction, names: Sequence[str]
) -> dict[str, Any]:
    """Return what predictions.json says of one image; boxes are x1, y1, x2, y2 in its pixels."""
    row = {"file_name": file_name, "width": size[0], "height": size[1]}
    if isinstance(found, ClassScores):
        classes = [
            {"score": round(score, 5), "class": names.index(name), "name": name}
            for name, score in found.likely()
        ]
        return row | {"classes": classes} | ({"several": True} if found.several else {})
    boxes = [
        {"box": [round(v, 2) for v in box], "score": round(score, 5), "class": k, "name": names[k]}
        for box, score, k in _rows(found)
    ]
    return row | {"boxes": boxes}


def coco_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn rows of predictions.json into COCO results: image_id counts images from 0."""
    results = []
    for number, row in enumerate(rows):
        for item in row["boxes"]:
            x1, y1, x2, y2 = item["box"]
            results.append(
                {
                    "image_id": number,
                    "file_name": row["file_name"],
                    "category_id": item["class"],
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "score": item["score"],
                }
            )
    return results


def yolo_lines(size: tuple[int, int], found: Prediction) -> list[str]:
    """Return `class x y width height score` per box: centre and sides as shares of the image.

    Of whole images: `score name` of the likeliest classes.
    """
    if isinstance(found, ClassScores):
        return [f"{score:.5f} {name}" for name, score in found.likely()]
    width, height = size
    lines = []
    for (x1, y1, x2, y2), score, label in _rows(found):
        middle = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
        sides = (x2 - x1) / width, (y2 - y1) / height
        lines.append(" ".join([str(label), *(f"{v:.6f}" for v in (*middle, *sides, score))]))
    return lines


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader never sees half of it.

    Raises:
        StorageError: when it can't be written.
    """
    text = json.dumps(value, indent=1) + "\n"  # ASCII: names of files need not be UTF-8
    with storing(path):
        replace_file(path, text.encode())


def write_picture(
    path: Path, pixels: NDArray[np.uint8], found: Prediction, names: Sequence[str]
) -> None:
    """Draw the boxes on `pixels` and write them, as JPEG where the suffix is unusual."""
    if path.suffix.lower() not in DRAWABLE:
        path = path.with_name(path.name + ".jpg")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(pixels, found, names)).save(path, quality=92)


class Film:
    """An mp4 under way; single frames where OpenCV has no mp4 codec."""

    def __init__(self, path: Path, frames_per_s: float) -> None:
        self._path = path.with_suffix(".mp4")
        self._rate = frames_per_s
        self._writer: cv2.VideoWriter | None = None

    def add(
        self, pixels: NDArray[np.uint8], found: Prediction, names: Sequence[str], number: int
    ) -> None:
        """Draw and append frame `number` (H, W, 3) RGB; all have the first one's size."""
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            code = cv2.VideoWriter.fourcc(*"mp4v")
            size = (pixels.shape[1], pixels.shape[0])
            self._writer = cv2.VideoWriter(opencv_name(self._path), code, self._rate, size)
        if self._writer.isOpened():
            self._writer.write(cv2.cvtColor(draw(pixels, found, names), cv2.COLOR_RGB2BGR))
        else:
            write_picture(self._path.with_suffix("") / f"{number:06d}.jpg", pixels, found, names)

    def close(self) -> None:
        """Finish the file: without this it can't be played."""
        if self._writer is not None:
            self._writer.release()


def _rows(found: Detections) -> zip[tuple[list[float], float, int]]:
    return zip(
        found.boxes.double().tolist(), found.scores.tolist(), found.classes.tolist(), strict=True
    )
