"""What a prediction leaves: pictures, films and labels at once, JSON files at the end.

Until then each process keeps what it found in a file of lines, which a crash leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from visiontrain.core.durable import storing
from visiontrain.core.types import Prediction
from visiontrain.data.inputs import Input, frame_rate
from visiontrain.data.shots import Shot
from visiontrain.data.walk import PREDICTIONS, UNFINISHED
from visiontrain.predict_config import PredictConfig
from visiontrain.report.detections import (
    Film,
    coco_rows,
    image_row,
    write_json,
    write_picture,
    yolo_lines,
)


class ShotWriter:
    """Writes what was found in the shots of one process, which come in order."""

    def __init__(
        self, config: PredictConfig, rank: int, names: Sequence[str], inputs: Sequence[Input]
    ) -> None:
        self.config, self.folder, self.names = config, Path(config.out or "."), names
        self.rows: list[tuple[int, dict[str, Any]]] = []  # place of the input, what was found
        self._part = self.folder / UNFINISHED.format(rank)
        self._lines: TextIO | None = None  # of `_part`
        self._stems = stems(inputs)
        self._film: Film | None = None
        self._filmed = -1  # place of the video of `_film`

    def add(self, shot: Shot, found: Prediction) -> None:
        """Take what was found in `shot`; the frames of a video come in order."""
        height, width = shot.pixels.shape[:2]
        row = image_row(shot.name, (width, height), found, self.names)
        self.rows.append((shot.place, row))
        with storing(self.folder):
            if self._lines is None:
                self.folder.mkdir(parents=True, exist_ok=True)  # on a machine of its own
                self._lines = self._part.open("w", buffering=1, encoding="ascii")
            self._lines.write(json.dumps(row) + "\n")
            if self.config.save:
                self._draw(shot, found)
            if self.config.save_txt:
                path = self._label_path(shot)
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = yolo_lines((width, height), found)
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def close(self) -> None:
        """Finish the last film: without this it can't be played."""
        self._end_film()
        if self._lines is not None:
            with suppress(OSError):  # of a line that was told not to fit; it tries again
                self._lines.close()

    def discard(self) -> None:
        """Remove the lines, on a machine of its own too: predictions.json says what they did."""
        with storing(self._part):
            self._part.unlink(missing_ok=True)

    def _end_film(self) -> None:
        if self._film is not None:
            self._film.close()

    def _draw(self, shot: Shot, found: Prediction) -> None:
        if shot.frame is None:
            path = self.folder / "images" / shot.input.name
            write_picture(path, shot.pixels, found, self.names)
            return
        if self._filmed != shot.place:
            self._end_film()
            rate = frame_rate(shot.input.path) / self.config.vid_stride
            path = self.folder / "images" / f"{self._stems[shot.place]}.mp4"
            self._film, self._filmed = Film(path, rate), shot.place
        if self._film is not None:
            self._film.add(shot.pixels, found, self.names, shot.frame)

    def _label_path(self, shot: Shot) -> Path:
        stem = self.folder / "labels" / self._stems[shot.place]
        if shot.frame is not None:
            return stem / f"{shot.frame:06d}.txt"
        return stem.with_name(f"{stem.name}.txt")


def stems(inputs: Sequence[Input]) -> list[str]:
    """Name what is written beside the pictures: `a` for a.jpg, `a.png` for an a.png after it.

    Whether a.jpg can be read makes no difference: the process that has a.png does not know.
    """
    pictures = (PurePosixPath(item.name) for item in inputs if not item.is_video)
    folders = {str(parent) for name in pictures for parent in name.parents}
    taken: set[tuple[bool, str]] = set()  # of films, whose frames' labels lie in a folder, and not
    names = []
    for item in inputs:
        plain = item.name.removesuffix(PurePosixPath(item.name).suffix)
        lies_there = item.is_video and plain in folders  # frames as pictures beside their film
        name = item.name if (item.is_video, plain) in taken or lies_there else plain
        taken.add((item.is_video, name))
        names.append(name)
    return names


def write_predictions(
    config: PredictConfig, folder: Path, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write predictions.json and, where it is asked for, COCO results, in the place of lines.

    Raises:
        StorageError: when they can't be written.
    """
    content = {
        "weights": config.weights,
        "source": config.source,
        "names": list(names),
        "conf": config.conf,
        "images": rows,
    }
    write_json(folder / PREDICTIONS, content)
    if config.save_json:
        write_json(folder / "detections.json", coco_rows(rows))
    with storing(folder):  # of processes that are gone, too
        for part in folder.glob(UNFINISHED.format("*")):
            part.unlink(missing_ok=True)
