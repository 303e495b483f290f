"""Changes of a picture by policy: TrivialAugment and RandAugment.

Operations and their ranges as in Müller and Hutter 2021 (arXiv 2103.10158) and Cubuk et al. 2020
(arXiv 1909.13719); each takes a strength in [0, 1] and a sign.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.data.letterbox import GREY

Pixels = NDArray[np.uint8]  # (H, W, 3)
Operation = Callable[[Pixels, float, int], Pixels]
MEDIUM = 9 / 30  # RandAugment's strength, as its paper's on ImageNet
TWICE = 2  # its operations on each picture
POLICY_DRAWS = 3 * TWICE  # numbers that a picture takes


def _moved(image: Pixels, matrix: list[list[float]]) -> Pixels:
    size = image.shape[1], image.shape[0]
    border = {"borderMode": cv2.BORDER_CONSTANT, "borderValue": (GREY,) * 3}
    return np.asarray(cv2.warpAffine(image, np.array(matrix, np.float64), size, **border), np.uint8)  # pyrefly: ignore


def shear_x(image: Pixels, strength: float, sign: int) -> Pixels:
    """Shear along x, up to 0.99."""
    value = 0.99 * strength * sign
    return _moved(image, [[1, value, -value * image.shape[0] / 2], [0, 1, 0]])


def shear_y(image: Pixels, strength: float, sign: int) -> Pixels:
    """Shear along y, up to 0.99."""
    value = 0.99 * strength * sign
    return _moved(image, [[1, 0, 0], [value, 1, -value * image.shape[1] / 2]])


def translate_x(image: Pixels, strength: float, sign: int) -> Pixels:
    """Shift along x, up to a third of the width."""
    return _moved(image, [[1, 0, sign * strength * image.shape[1] / 3], [0, 1, 0]])


def translate_y(image: Pixels, strength: float, sign: int) -> Pixels:
    """Shift along y, up to a third of the height."""
    return _moved(image, [[1, 0, 0], [0, 1, sign * strength * image.shape[0] / 3]])


def rotate(image: Pixels, strength: float, sign: int) -> Pixels:
    """Turn about the middle, up to 135 degrees."""
    centre = (image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2
    return _moved(image, cv2.getRotationMatrix2D(centre, 135 * strength * sign, 1.0).tolist())


def brightness(image: Pixels, strength: float, sign: int) -> Pixels:
    """Darken or brighten by a factor between 0.01 and 1.99."""
    return _blend(image, np.zeros_like(image), strength, sign)


def colour(image: Pixels, strength: float, sign: int) -> Pixels:
    """Take colour away or add some."""
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)
    return _blend(image, np.repeat(grey[..., None], 3, axis=2), strength, sign)


def contrast(image: Pixels, strength: float, sign: int) -> Pixels:
    """Bring all nearer to the mean brightness, or further from it."""
    mean = float(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)).mean())
    return _blend(image, np.full_like(image, round(mean)), strength, sign)


def sharpness(image: Pixels, strength: float, sign: int) -> Pixels:
    """Blur or sharpen."""
    return _blend(image, np.asarray(cv2.blur(image, (3, 3)), np.uint8), strength, sign)


def _blend(image: Pixels, base: Pixels, strength: float, sign: int) -> Pixels:
    share = 1 + 0.99 * strength * sign
    return np.asarray(cv2.addWeighted(image, share, base, 1 - share, 0), np.uint8)


def posterize(image: Pixels, strength: float, sign: int) -> Pixels:
    """Keep 8 to 2 bits of each value."""
    del sign
    bits = 8 - round(6 * strength)
    return image & np.uint8(256 - 2 ** (8 - bits))


def solarize(image: Pixels, strength: float, sign: int) -> Pixels:
    """Invert the values above a threshold."""
    del sign
    return np.where(image >= 256 * (1 - strength), 255 - image, image).astype(np.uint8)


def autocontrast(image: Pixels, strength: float, sign: int) -> Pixels:
    """Stretch each channel to the whole range."""
    del strength, sign
    ends = [cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]
    low, high = np.array(ends, np.float32).T
    span = np.where(high > low, high - low, np.float32(255))
    levels = np.arange(256, dtype=np.float32)[:, None] - np.where(high > low, low, 0)
    table = (levels * (np.float32(255) / span) + np.float32(0.5)).clip(0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table.reshape(1, 256, 3)), np.uint8)


def equalize(image: Pixels, strength: float, sign: int) -> Pixels:
    """Make each channel's histogram flat."""
    del strength, sign
    equal = [cv2.equalizeHist(channel) for channel in cv2.split(image)]
    return np.dstack(equal).astype(np.uint8)


def identity(image: Pixels, strength: float, sign: int) -> Pixels:
    """Change nothing."""
    del strength, sign
    return image


OPERATIONS: Mapping[str, Operation] = {
    f.__name__: f
    for f in (
        *(identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, colour),
        *(contrast, sharpness, posterize, solarize, autocontrast, equalize),
    )
}


def apply_policy(image: Pixels, policy: str, draws: NDArray[np.float64]) -> Pixels:
    """Change a picture by `policy`, as numbers in [0, 1) say: (POLICY_DRAWS,), three for each."""
    operations = list(OPERATIONS.values())
    trivial = policy == "trivial"
    for which, drawn, sign in draws.reshape(TWICE, 3)[: 1 if trivial else TWICE].tolist():
        operation = operations[int(which * len(operations))]
        image = operation(image, drawn if trivial else MEDIUM, 1 if sign < 0.5 else -1)
    return image
