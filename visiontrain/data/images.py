"""Pixels from files: decoded from bytes, so that damage is an error and never a grey half."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL.JpegImagePlugin import JpegImageFile

from visiontrain.core.interfaces import ImageSource
from visiontrain.data.header import Header, ImageError, read_header

Pixels = NDArray[np.uint8]

# Orientation is applied here: which formats OpenCV turns depends on its version.
FLAGS = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION
END = b"\xff\xd9"  # JPEG's end of image
PROGRESSIVE = b"\xff\xc2"  # starts a frame that comes in several goes
FILLER = bytes(range(254, 0, -1)) * 4  # entropy-coded data that says something


class Paths:
    """File paths in one blob and offsets: no string objects for loader processes to copy."""

    def __init__(self, paths: Iterable[str | Path]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.blob = np.frombuffer(b"".join(encoded), np.uint8)
        self.offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        return os.fsdecode(self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    @classmethod
    def of_arrays(cls, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Self:
        """Return the paths that lie in `blob`, path i at offsets[i] : offsets[i + 1]."""
        paths = cls(())
        paths.blob, paths.offsets = blob, offsets
        return paths

    def select(self, rows: NDArray[np.int64]) -> Paths:
        """Return the paths of `rows`."""
        return Paths(self[row] for row in rows)


class StoredImages(ImageSource, Protocol):
    """An ImageSource of encoded images, of which some can be chosen."""

    @property
    def max_pixels(self) -> int:
        """Larger images are refused."""
        ...

    def read_bytes(self, row: int) -> bytes:
        """Return the file of image `row`; raise ImageError when it cannot be read."""
        ...

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return the images of `rows`."""
        ...


class FileImages:
    """An ImageSource of image files."""

    def __init__(self, paths: Paths, max_pixels: int) -> None:
        self.paths = paths
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, row: int) -> Pixels:
        """Decode image `row` (H, W, 3), RGB, upright."""
        return decode(self.read_bytes(row), self.paths[row], self.max_pixels)

    def read_bytes(self, row: int) -> bytes:
        """Return the file's content."""
        return read_bytes(self.paths[row])

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return the images of `rows`."""
        return type(self)(self.paths.select(rows), self.max_pixels)

    def name(self, row: int) -> str:
        """Return the file's path."""
        return self.paths[row]


def read_bytes(path: str) -> bytes:
    """Read a whole file; ImageError when that fails."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageError(path, "missing-image", "no such file") from error
    except OSError as error:
        raise ImageError(path, "corrupt-image", f"cannot be read ({error.strerror})") from error


def decode(data: bytes, where: str, max_pixels: int) -> Pixels:
    """Decode an image file's bytes to (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Grey becomes three equal channels; 16 bit are divided by 257, whatever range is used;
    alpha is dropped (a TIFF's is multiplied in: libtiff does so); CMYK is converted.

    Raises:
        ImageError: The image is larger than `max_pixels` (nothing was decoded), truncated,
            damaged, or of a format or depth that is not read.
    """
    head = read_header(io.BytesIO(data), where, max_pixels)
    raw = _imdecode(data)
    if raw is None and head.format == "jpeg" and lacks_only_end(data):
        raw = _imdecode(_ended(data))
    if raw is None:
        raise ImageError(where, "truncated-image", f"a {head.format} that is truncated or damaged")
    if raw.dtype == np.uint16:
        raw = cv2.convertScaleAbs(raw, alpha=1 / 257)
    elif raw.dtype != np.uint8:
        reason = f"has {raw.dtype} samples; convert it to 8 or 16 bit"
        raise ImageError(where, "unknown-format", reason)
    colour = cv2.COLOR_GRAY2RGB if raw.ndim == 2 else cv2.COLOR_BGR2RGB
    return _upright(np.asarray(cv2.cvtColor(raw, colour), np.uint8), head, where)


def is_decodable(data: bytes) -> bool:
    """Tell whether OpenCV takes the bytes as they are: not without an end marker."""
    return _imdecode(data) is not None


def lacks_only_end(data: bytes) -> bool:
    """Tell whether a JPEG without its end marker has all of its picture.

    What follows complete entropy-coded data is skipped by the decoder; what follows
    truncated data is decoded. So noise put there changes the picture, or it does not.
    """
    clean, noisy = _quietly(_ended(data)), _quietly(_ended(data, FILLER))
    return clean is not None and noisy is not None and np.array_equal(clean, noisy)


def is_hollow(data: bytes) -> bool:
    """Tell whether a JPEG *with* an end marker lacks data before it (shown as grey).

    OpenCV decodes such a file without an error, so `decode` cannot refuse it.
    """
    end = data.rfind(END)
    return end > 0 and not lacks_only_end(data[:end])


def _ended(data: bytes, before: bytes = b"") -> bytes:
    return data.rstrip(b"\xff") + before + END


def _quietly(data: bytes) -> NDArray[np.uint8] | None:
    """Decode a JPEG with Pillow, which prints nothing about its damage; OpenCV's does."""
    try:
        with JpegImageFile(io.BytesIO(data)) as image:
            if PROGRESSIVE not in data:  # else what comes last is what an eighth does not show
                image.draft(image.mode, (1, 1))  # an eighth: a fifth of the time
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, struct.error):
        return None


def _imdecode(data: bytes) -> NDArray[Any] | None:
    try:
        raw = cv2.imdecode(np.frombuffer(data, np.uint8), FLAGS)
    except cv2.error:  # e.g. an unreadable header, which None does not cover
        return None
    return None if raw is None else np.asarray(raw)


def _upright(image: Pixels, head: Header, where: str) -> Pixels:
    """Turn the image by its EXIF orientation; TIFF comes upright from OpenCV."""
    if head.format != "tiff" and head.orientation != 1:
        image = TURNS[head.orientation](image)
    if image.shape[1::-1] != head.size:
        reason = f"decodes to {image.shape[1]} x {image.shape[0]}, its header says {head.size}"
        raise ImageError(where, "corrupt-image", reason)
    return np.ascontiguousarray(image)


TURNS = {
    2: np.fliplr,
    3: lambda image: image[::-1, ::-1],
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
