"""Pictures and videos without labels: what a path, a folder or a glob stands for."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.core.interfaces import ImageSource
from visiontrain.data.config import DataConfig
from visiontrain.data.header import SUFFIXES
from visiontrain.data.open import composed_sets, open_dataset

SCENES = 8  # of a data set that ships whole
VIDEOS = frozenset((".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"))


@dataclass(frozen=True, slots=True)
class Input:
    """One file to predict on, or one composed scene."""

    path: Path
    name: str  # relative to what was asked for, with forward slashes
    scene: tuple[ImageSource, int] | None = None  # what composes it, and its row there

    @property
    def is_video(self) -> bool:
        """Say whether the file holds frames; told by its suffix."""
        return self.path.suffix.lower() in VIDEOS


def find_inputs(source: str) -> list[Input]:
    """List the files that `source` stands for, sorted by name: equal on every machine.

    Args:
        source: a file (of any suffix), a folder (walked, hidden ones left out), a glob, or, where
            there is no such file or folder, `digits` or another data set that ships whole: the
            first scenes of its test split.

    Raises:
        DataError: when there is no such file, or nothing in the folder that can be read.
    """
    path = Path(source)
    if path.is_file():
        return [Input(path, path.name)]
    if path.is_dir():
        root, files = path, list(_walk(path))
    elif glob.has_magic(source):
        # Path.glob refuses absolute patterns.
        files = [Path(name) for name in glob.iglob(source, recursive=True)]  # noqa: PTH207
        files = [file for file in files if file.is_file() and _is_known(file)]
        root = Path(os.path.commonpath([file.parent for file in files])) if files else path
    elif source in (composed := composed_sets()):
        return _scenes(source)
    else:
        advice = f"give a path, a folder or a glob, or {' or '.join(composed)}"
        raise DataError(f"source: no file or folder {source!r}; {advice}")
    if not files:
        raise DataError(f"source: no picture or video in {source!r}; looked for {_suffixes()}")
    inputs = [Input(file, file.relative_to(root).as_posix()) for file in files]
    return sorted(inputs, key=lambda item: item.name)


def read_frames(path: Path, stride: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield every `stride`-th frame of a video with its number, as (H, W, 3) RGB.

    Raises:
        DataError: when the file cannot be opened or holds no frame.
    """
    video = cv2.VideoCapture(opencv_name(path))
    try:
        number = -1
        while video.grab():
            number += 1
            if number % stride == 0:
                good, frame = video.retrieve()
                if good:
                    yield (
                        number,
                        cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False),
                    )
        if number < 0:
            raise DataError(f"{path}: not a video that OpenCV can decode; convert it to mp4")
    finally:
        video.release()


def frame_rate(path: Path) -> float:
    """Return a video's frames per second, 25 where the file does not say."""
    video = cv2.VideoCapture(opencv_name(path))
    rate = video.get(cv2.CAP_PROP_FPS)
    video.release()
    return rate if 0 < rate < 1000 else 25.0


def opencv_name(path: Path) -> Any:
    """Return `path` as OpenCV takes it: a text that is no UTF-8 would end the process."""
    encoded = os.fsencode(path)
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        return encoded


def _scenes(source: str) -> list[Input]:
    images = open_dataset(DataConfig(source=source, val_images=SCENES)).read("test").images
    names = [f"{images.name(row)}.png" for row in range(len(images))]
    return [Input(Path(name), name, (images, row)) for row, name in enumerate(names)]


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if _is_known(path))


def _is_known(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES | VIDEOS


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES | VIDEOS))
