"""Pictures and videos without labels: what a path, a folder or a glob stands for."""

from __future__ import annotations

import glob
import math
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
from visiontrain.data.walk import is_picture, walk

SCENES = 8  # of a data set that ships whole
VIDEOS = frozenset(
    (
        *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".mts"),
        *(".m2ts", ".3gp", ".asf", ".flv", ".vob", ".ogv"),
    )
)
GUESSED = 0.05  # share of its frames by which a whole film may be shorter than it says
PATIENCE = 3000  # frames in a row that cannot be read, after which nothing more is expected
TIMEBASE = 65  # frames per second up to which mp4 takes fractions


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
        source: a file (of any suffix), a folder (as `walk` goes through it; pictures of formats
            that are not read are among them, to be told), a glob, or, where there is no such file
            or folder, `digits` or another data set that ships whole: the first scenes of its test
            split.

    Raises:
        DataError: when there is no such file, or no picture or video in the folder.
    """
    source = os.path.expanduser(source)  # noqa: PTH111 - Path's raises
    path = Path(source)
    if os.path.isfile(path):  # noqa: PTH113 - Path's raises
        return [Input(path, path.name)]
    if os.path.isdir(path):  # noqa: PTH112 - Path's raises
        root, files = path, [Path(name) for name in walk(path, _is_known)]
    elif glob.has_magic(source):
        # Path.glob refuses absolute patterns.
        files = [Path(name) for name in glob.iglob(source, recursive=True)]  # noqa: PTH207
        files = [file for file in files if _is_known(file.name) and os.path.isfile(file)]  # noqa: PTH113
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


def read_frames(
    path: Path, stride: int, max_pixels: int | None = None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield every `stride`-th frame of a video with its number, as (H, W, 3) RGB.

    Raises:
        DataError: the file cannot be opened or holds no frame; its frames have more than
            `max_pixels`; after the last frame that can be
            read, where others could not.
    """
    video = cv2.VideoCapture(opencv_name(path))
    number, read, last = 0, 0, -1  # frames that were tried, that are good, the last good one
    try:
        sides = (video.get(cv2.CAP_PROP_FRAME_WIDTH), video.get(cv2.CAP_PROP_FRAME_HEIGHT))
        if max_pixels is not None and math.prod(sides) > max_pixels:
            raise DataError(
                f"{path}: frames of {math.prod(sides):,.0f} pixels, over max_pixels={max_pixels:,}"
            )
        said = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        # Damage in the middle is not the end.
        while (grabbed := video.grab()) or number < min(said, last + PATIENCE):
            good, frame = video.retrieve() if grabbed and number % stride == 0 else (grabbed, None)
            read, last = read + good, number if good else last
            if good and frame is not None:
                yield number, cv2.cvtColor(frame, cv2.COLOR_BGR2RGB).astype(np.uint8, copy=False)
            number += 1
    finally:
        video.release()
    if last < 0:
        raise DataError(f"{path}: not a video that OpenCV can decode; convert it to mp4")
    # What a film says of its length may be a guess, so a little less is no damage.
    expected = said if last + 1 < (1 - GUESSED) * said else last + 1
    if read < expected:
        raise DataError(f"{path}: {read} of {expected} frames can be read; the rest is damaged")


def frame_rate(path: Path) -> float:
    """Return a video's frames per second, 25 where the file does not say."""
    video = cv2.VideoCapture(opencv_name(path))
    rate = video.get(cv2.CAP_PROP_FPS)
    video.release()
    if not 0 < rate < 1000:
        return 25.0
    return rate if rate < TIMEBASE else float(round(rate))


def opencv_name(path: Path) -> Any:
    """Return `path` as OpenCV takes it: a text that is no UTF-8 would end the process.

    Absolute: FFmpeg takes what stands before a colon for a protocol.
    """
    encoded = os.fsencode(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        return encoded


def _scenes(source: str) -> list[Input]:
    images = open_dataset(DataConfig(source=source, val_images=SCENES)).read("test").images
    names = [f"{images.name(row)}.png" for row in range(len(images))]
    return [Input(Path(name), name, (images, row)) for row, name in enumerate(names)]


def _is_known(name: str) -> bool:
    hidden = name.startswith(".")
    return is_picture(name) or (not hidden and Path(name).suffix.lower() in VIDEOS)


def _suffixes() -> str:
    return " ".join(sorted(SUFFIXES | VIDEOS))
