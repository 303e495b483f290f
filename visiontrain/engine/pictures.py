"""Pictures as users give them: files or arrays, one or many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.images import decode, read_bytes

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
Picture = str | Path | Pixels | Image.Image
MAX_PIXELS = 64_000_000


def batches(
    images: Picture | Iterable[Picture], size: int, max_pixels: int = MAX_PIXELS
) -> Iterator[list[Pixels]]:
    """Yield pictures, read from files where they are paths, `size` at a time.

    Files of more than `max_pixels` are refused from their header; arrays may have any size.

    Raises:
        DataError: a file cannot be read, or an array has another shape or type.
        ConfigError: `size` is below 1.
    """
    if size < 1:
        raise ConfigError(f"batch: {size}; take 1 or more")
    one = isinstance(images, str | Path | Image.Image)
    one = one or (isinstance(images, np.ndarray) and images.ndim < 4)
    pictures: Iterator[Picture] = iter([images] if one else images)  # pyrefly: ignore
    numbered = enumerate(pictures)  # perhaps a film's frames, of which no list would fit
    while part := list(islice(numbered, size)):
        yield [_pixels(picture, number, max_pixels) for number, picture in part]


def _pixels(picture: Picture, number: int, max_pixels: int) -> Pixels:
    if isinstance(picture, str | Path):
        return decode(read_bytes(str(picture)), str(picture), max_pixels)
    if isinstance(picture, Image.Image):
        return _of_pil(ImageOps.exif_transpose(picture), f"images[{number}]")
    good = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    if not good or not picture.size:
        got = f"an array {picture.shape} of {picture.dtype}"
        raise DataError(f"images[{number}]: {got}; give RGB (H, W, 3) of uint8, no side empty")
    return picture


def _of_pil(picture: Image.Image, where: str) -> Pixels:
    """Return PIL's picture as (H, W, 3): of 16 bit as of a file, where PIL would cut off.

    Raises:
        DataError: it is deeper, or of floats: what is white in it cannot be known.
    """
    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture).astype(np.float32)  # of any byte order
        grey = (deep / 257).round().astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise DataError(
            f"{where}: PIL's mode {picture.mode}, whose white is not known; give uint8, or the path"
        )
    return np.asarray(picture.convert("RGB"))
