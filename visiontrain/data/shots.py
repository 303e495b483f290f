"""Pictures and frames of videos, in the batches that they are predicted in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.data.images import decode, read_bytes
from visiontrain.data.inputs import Input, read_frames


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture, or one frame of a video."""

    input: Input
    place: int  # of the input in the list of all, from 0
    frame: int | None  # number in the video, from 0
    pixels: NDArray[np.uint8]  # (H, W, 3) RGB

    @property
    def name(self) -> str:
        """Name it in the results: `cats/a.jpg`, or `tour.mp4#000012`."""
        return self.input.name if self.frame is None else f"{self.input.name}#{self.frame:06d}"


def portions(inputs: Sequence[Input], batch: int) -> list[list[int]]:
    """Cut inputs into what one process takes at a time: `batch` pictures, or one video.

    It hangs on the list alone, so a picture is computed beside the same others on any number of
    processes: outputs of one image change in the sixth digit with the batch it is in.
    """
    pictures = [place for place, item in enumerate(inputs) if not item.is_video]
    videos = [[place] for place, item in enumerate(inputs) if item.is_video]
    return [pictures[i : i + batch] for i in range(0, len(pictures), batch)] + videos


@dataclass(frozen=True, slots=True)
class ShotReader:
    """Reads inputs; what can't be read is noted and left out."""

    inputs: Sequence[Input]
    batch: int  # shots at a time
    stride: int  # of the frames taken from videos
    max_pixels: int
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # place and reason

    def batches(self, taken: Sequence[Sequence[int]]) -> Iterator[list[Shot]]:
        """Yield the shots of the portions `taken`, the next batch being read in a thread."""
        coming = self._batches(taken)
        with ThreadPoolExecutor(1) as pool:
            after = pool.submit(next, coming, None)
            while (shots := after.result()) is not None:
                after = pool.submit(next, coming, None)
                yield shots

    def _batches(self, taken: Sequence[Sequence[int]]) -> Iterator[list[Shot]]:
        for portion in taken:
            shots = chain.from_iterable(self._shots(place) for place in portion)
            while some := list(islice(shots, self.batch)):
                yield some

    def _shots(self, place: int) -> Iterator[Shot]:
        item = self.inputs[place]
        try:
            if item.scene is not None:
                images, row = item.scene
                yield Shot(item, place, None, images.read(row))
            elif item.is_video:
                for number, pixels in read_frames(item.path, self.stride, self.max_pixels):
                    yield Shot(item, place, number, pixels)
            else:
                data = read_bytes(str(item.path))
                yield Shot(item, place, None, decode(data, str(item.path), self.max_pixels))
        except DataError as error:
            self.unreadable.append((place, str(error)))
