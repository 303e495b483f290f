"""Fit an image into a square: aspect kept, centred, padded grey."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

GREY = 114


def letterbox(image: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return the image as (side, side, 3) and its frame: scale, pad x, pad y, width, height."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    pad_x, pad_y = (side - inner[0]) // 2, (side - inner[1]) // 2
    canvas = np.full((side, side, 3), GREY, np.uint8)
    resized = image if inner == (width, height) else cv2.resize(image, inner)
    canvas[pad_y : pad_y + inner[1], pad_x : pad_x + inner[0]] = resized
    return canvas, np.array([scale, pad_x, pad_y, width, height], np.float32)


def boxed(targets: NDArray[np.float32], frame: NDArray[np.float32]) -> NDArray[np.float32]:
    """Move target rows (M, 6) from original pixels into the letterboxed square."""
    scale, pad_x, pad_y = frame[:3]
    moved = targets.copy()
    moved[:, 1:5] = targets[:, 1:5] * scale + np.array([pad_x, pad_y, pad_x, pad_y], np.float32)
    return moved
