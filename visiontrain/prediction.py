"""The predict verb: find objects in pictures and videos, draw them, write them down."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.core.types import Detections
from visiontrain.data.defects import counted, printable
from visiontrain.data.inputs import Input, find_inputs, frame_rate, read_frames
from visiontrain.engine.detector import Detector, load_detector, read_pixels
from visiontrain.engine.durable import storing
from visiontrain.engine.run_folder import claim
from visiontrain.predict_config import DetectorConfig, PredictConfig
from visiontrain.report.detections import (
    Film,
    coco_rows,
    image_row,
    write_json,
    write_picture,
    yolo_lines,
)

Say = Callable[[str], None]  # shows one line to a person
FAINT = 0.001  # a score that nobody misses; suppressing all below takes seconds an image


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture, or one frame of a video."""

    input: Input
    frame: int | None  # number in the video, from 0
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB

    @property
    def name(self) -> str:
        """Name it in the results: `cats/a.jpg`, or `tour.mp4#000012`."""
        return self.input.name if self.frame is None else f"{self.input.name}#{self.frame:06d}"


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a prediction left."""

    folder: Path
    rows: list[dict[str, Any]]  # as in predictions.json: file_name, width, height, boxes
    unreadable: list[str]  # one reason per file that was left out
    seconds: float  # reading, forward passes and writing; not loading the weights
    conf: float = 0.0  # least score of what counts as found
    best: float = 0.0  # highest score of all, found or not

    @property
    def objects(self) -> int:
        """Return how many objects were found."""
        return sum(len(row["boxes"]) for row in self.rows)

    def summary(self) -> str:
        """Say in one line how many images, objects, images per second, and where."""
        speed = len(self.rows) / max(self.seconds, 1e-9)
        left_out = f", {len(self.unreadable)} unreadable left out" if self.unreadable else ""
        objects = counted(self.objects, "object")
        if not self.objects:  # not found, or nearly?
            nearest = f"the best score was {self.best:.2g}" if self.best else "all are below 0.001"
            objects += f" above conf={self.conf:g} ({nearest})"
        images = counted(len(self.rows), "image")
        return f"{images}{left_out}, {objects}, {speed:.1f} images/s: {self.folder}"


def load(config: DetectorConfig) -> Detector:
    """Read the weights that `config` names, ready for use on its device.

    Raises:
        CheckpointError: when the weights can't be used.
        ConfigError: when there is no such device.
    """
    decoding = {key: getattr(config, key) for key in ("conf", "iou", "nms", "max_det")}
    return load_detector(config.weights, decoding, imgsz=config.imgsz, device=config.device)


def predict(config: PredictConfig, say: Say) -> Predicted:
    """Predict on `config.source`; `say` is told of files that can't be read, and the end.

    Raises:
        DataError: when the source is missing or nothing in it can be read.
        CheckpointError: when the weights can't be used.
        StorageError: when the results can't be written.
    """
    inputs = find_inputs(config.source)
    # Fainter ones are asked for too, to tell how near the rest came.
    detector = load(config.model_copy(update={"conf": min(config.conf, FAINT)}))
    parent = Path(config.project) / detector.kind
    folder = claim(config.out, parent, config.name).path
    began = time.perf_counter()
    unreadable: list[str] = []
    best = 0.0
    writer = Writer(config, folder, detector.names)
    shots = chain.from_iterable(_shots(item, config, unreadable) for item in inputs)
    try:
        for part in _ahead(_parts(shots, config.batch)):
            found = detector.detect([shot.pixels for shot in part])
            for shot, objects in zip(part, found, strict=True):
                best = max([best, *objects.scores[:1].tolist()])
                writer.add(shot, above(objects, config.conf))
    finally:
        writer.close()
    for reason in unreadable:
        say(printable(f"left out: {reason}"))
    if not writer.rows:
        raise DataError(f"source: nothing in {config.source!r} could be read; see the lines above")
    seconds = time.perf_counter() - began
    result = Predicted(folder, writer.rows, unreadable, seconds, config.conf, best)
    say(printable(result.summary()))
    return result


def above(found: Detections, conf: float) -> Detections:
    """Return the detections, best first, that are scored `conf` or higher."""
    count = int((found.scores >= conf).sum())
    return Detections(
        found.boxes[:count], found.scores[:count], found.classes[:count], found.names[:count]
    )


@dataclass(slots=True)
class Writer:
    """Writes each shot's pictures and labels at once, the JSON files at the end."""

    config: PredictConfig
    folder: Path
    names: Sequence[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    _film: Film | None = None
    _filmed: Path | None = None  # the video of `_film`
    _labels: set[Path] = field(default_factory=set)
    _videos: dict[str, Path] = field(default_factory=dict)  # what it is called here -> the video

    def add(self, shot: Shot, found: Detections) -> None:
        """Take what was found in `shot`; the frames of a video come in order."""
        height, width = shot.pixels.shape[:2]
        self.rows.append(image_row(shot.name, (width, height), found, self.names))
        with storing(self.folder):
            if self.config.save:
                self._draw(shot, found)
            if self.config.save_txt:
                path = self._label_path(shot)
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = yolo_lines((width, height), found)
                path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def close(self) -> None:
        """Write what was found so far, also after an interruption."""
        if self._film is not None:
            self._film.close()
        content = {
            "weights": self.config.weights,
            "source": self.config.source,
            "names": list(self.names),
            "conf": self.config.conf,
            "images": self.rows,
        }
        write_json(self.folder / "predictions.json", content)
        if self.config.save_json:
            write_json(self.folder / "detections.json", coco_rows(self.rows))

    def _draw(self, shot: Shot, found: Detections) -> None:
        if shot.frame is None:
            path = self.folder / "images" / shot.input.name
            write_picture(path, shot.pixels, found, self.names)
            return
        if self._filmed != shot.input.path:
            if self._film is not None:
                self._film.close()
            rate = frame_rate(shot.input.path) / self.config.vid_stride
            path = self.folder / "images" / f"{self._stem(shot.input)}.mp4"
            self._film, self._filmed = Film(path, rate), shot.input.path
        if self._film is not None:
            self._film.add(shot.pixels, found, self.names)

    def _label_path(self, shot: Shot) -> Path:
        """Return `a.txt` for a.jpg; `a.png.txt` for an a.png beside it; each only once."""
        if shot.frame is not None:
            return self.folder / "labels" / self._stem(shot.input) / f"{shot.frame:06d}.txt"
        path = self.folder / "labels" / shot.input.name
        label = path.with_suffix(".txt")
        label = path.with_name(path.name + ".txt") if label in self._labels else label
        self._labels.add(label)
        return label

    def _stem(self, video: Input) -> str:
        """Return `tour` for tour.avi; `tour.mp4` for a tour.mp4 beside it."""
        plain = video.name.removesuffix(video.path.suffix)
        name = plain if self._videos.setdefault(plain, video.path) == video.path else video.name
        self._videos.setdefault(name, video.path)
        return name


def _shots(item: Input, config: PredictConfig, unreadable: list[str]) -> Iterator[Shot]:
    """Yield the picture, or the video's frames; what can't be read is noted and left out."""
    try:
        if item.scene is not None:
            images, row = item.scene
            yield Shot(item, None, images.read(row))
        elif item.is_video:
            for number, pixels in read_frames(item.path, config.vid_stride):
                yield Shot(item, number, pixels)
        else:
            yield Shot(item, None, read_pixels(item.path, config.max_pixels))
    except DataError as error:
        unreadable.append(str(error))


def _parts(shots: Iterator[Shot], size: int) -> Iterator[list[Shot]]:
    while part := list(islice(shots, size)):
        yield part


def _ahead(parts: Iterator[list[Shot]]) -> Iterator[list[Shot]]:
    """Yield the same, reading the next part in a thread while this one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, parts, None)
        while (part := coming.result()) is not None:
            coming = pool.submit(next, parts, None)
            yield part
