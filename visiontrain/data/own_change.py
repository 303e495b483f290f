"""A change of a user's own to each image and its labels, before all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Sample

Pixels = NDArray[np.uint8]
OwnChange = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True, slots=True)
class Found:
    """An image of a table as it was read."""

    row: int
    image: Pixels  # (H, W, 3)
    targets: NDArray[np.float32]  # (M, 6): class, xyxy in pixels of `image`, weight


def changed(
    found: Found, change: OwnChange, random: np.random.Generator, num_classes: int
) -> Found:
    """Let the user's function change an image and its boxes, which are clipped to it.

    Raises:
        ConfigError: it does not return a sample, or classes that there are not.
    """
    rows = found.targets
    # A copy: the array may be the data set's own, and functions may write into what they get.
    given = Sample(found.image.copy(), rows[:, 0].astype(np.int64), rows[:, 1:5].copy())
    sample = change(given, random)
    image = _image_of(sample)
    boxes = _boxes_of(sample)
    classes = np.asarray(sample.classes, np.float32).reshape(-1)
    if len(classes) != len(boxes):
        raise ConfigError(
            f"augment: returned {len(boxes)} boxes and {len(classes)} classes; return as many"
        )
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise ConfigError(
            f"augment: returned classes from {classes.min():g} to {classes.max():g}; there are "
            f"{num_classes}, from 0 on"
        )
    boxes = boxes.clip(0, np.tile(image.shape[1::-1], 2)).astype(np.float32)
    whole = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    targets = np.hstack([classes[:, None], boxes, np.ones_like(classes[:, None])])[whole]
    return replace(found, image=image, targets=targets)


def repainted(
    image: Pixels, classes: NDArray[np.int64], change: OwnChange, random: np.random.Generator
) -> Pixels:
    """Let the user's function change an image with classes, which stay.

    Raises:
        ConfigError: it does not return a sample, or other classes.
    """
    sample = change(Sample(image.copy(), classes.copy()), random)
    pixels = _image_of(sample)
    if not np.array_equal(np.atleast_1d(sample.classes), classes):
        raise ConfigError("augment: changed the classes of an image; they belong to the data set")
    return pixels


def _image_of(sample: Sample) -> Pixels:
    if not isinstance(sample, Sample):
        raise ConfigError(
            f"augment: returned a {type(sample).__name__}; return a visiontrain.Sample"
        )
    image = sample.image
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] != (3,):
        raise ConfigError("augment: returned no image of uint8, (H, W, 3)")
    if not image.size:
        raise ConfigError(f"augment: returned an image {image.shape}; no side may be empty")
    return image


def _boxes_of(sample: Sample) -> NDArray[np.float32]:
    boxes = np.asarray([] if sample.boxes is None else sample.boxes, np.float32)
    if boxes.size and (boxes.ndim != 2 or boxes.shape[1] != 4):
        raise ConfigError(f"augment: returned boxes {boxes.shape}; return (M, 4), x1, y1, x2, y2")
    return boxes.reshape(-1, 4)
