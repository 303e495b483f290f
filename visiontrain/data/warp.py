"""Turn, shear and tilt a finished canvas, and its boxes with it; blend and paste two of them."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.data.config import AugmentConfig
from visiontrain.data.letterbox import GREY
from visiontrain.data.mosaic import cut

BLEND = 32.0  # both parameters of mixup's Beta: shares lie near a half
FREE = 0.3  # share of a box that may lie under a pasted one

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]  # (M, 6) targets
Matrix = NDArray[np.float64]  # (3, 3), of homogeneous coordinates


def warps(config: AugmentConfig) -> bool:
    """Tell whether anything would turn, shear or tilt."""
    return bool(config.degrees or config.shear or config.perspective)


def draw_matrix(config: AugmentConfig, side: int, random: np.random.Generator) -> Matrix:
    """Draw a transform of a square canvas around its centre."""
    middle, back = np.eye(3), np.eye(3)
    middle[:2, 2], back[:2, 2] = -side / 2, side / 2
    tilt = np.eye(3)
    tilt[2, :2] = random.uniform(-config.perspective, config.perspective, 2) / side
    angle = math.radians(random.uniform(-config.degrees, config.degrees))
    turn = np.eye(3)
    turn[:2, :2] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    shear = np.eye(3)
    shear[0, 1], shear[1, 0] = np.tan(np.radians(random.uniform(-config.shear, config.shear, 2)))
    return back @ shear @ turn @ tilt @ middle


def warp(image: Pixels, rows: Rows, matrix: Matrix) -> tuple[Pixels, Rows]:
    """Return the image seen through `matrix`, and the boxes around what their corners become."""
    side = len(image)
    # Pixel i covers [i, i + 1): OpenCV maps centres, boxes are edges.
    half = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    centres = half @ matrix @ np.linalg.inv(half)
    border = (GREY, GREY, GREY)
    seen = cv2.warpPerspective(image, centres, (side, side), borderValue=border)
    return np.asarray(seen, np.uint8), move(rows, matrix, side)


def move(rows: Rows, matrix: Matrix, side: int) -> Rows:
    """Return the boxes around the moved corners, cut to the canvas."""
    corners = rows[:, [1, 2, 3, 2, 3, 4, 1, 4]].reshape(-1, 4, 2)
    flat = np.concatenate([corners, np.ones_like(corners[..., :1])], -1) @ matrix.T
    places = flat[..., :2] / flat[..., 2:]
    moved = rows.copy()
    moved[:, 1:3], moved[:, 3:5] = places.min(1), places.max(1)
    return cut(moved, (0, 0, side, side))


def blend(
    one: tuple[Pixels, Rows], other: tuple[Pixels, Rows], random: np.random.Generator
) -> tuple[Pixels, Rows]:
    """Lay two images over each other; all boxes of both count (mixup, Zhang et al. 2018)."""
    share = float(random.beta(BLEND, BLEND))
    image = cv2.addWeighted(one[0], share, other[0], 1 - share, 0)
    return np.asarray(image, np.uint8), np.concatenate([one[1], other[1]])


def paste(
    one: tuple[Pixels, Rows], other: tuple[Pixels, Rows], random: np.random.Generator
) -> tuple[Pixels, Rows]:
    """Copy objects, as the boxes around them, where they cover little of what is there.

    Each goes to a place of its own. After copy-paste (Ghiasi et al. 2021) without masks.
    """
    image, rows = one[0].copy(), list(one[1])
    height, width = image.shape[:2]
    for row in other[1]:
        x1, y1, x2, y2 = (round(float(v)) for v in row[1:5])
        w, h = x2 - x1, y2 - y1
        x, y = int(random.integers(max(1, width - w))), int(random.integers(max(1, height - h)))
        if min(w, h) < 2 or w > width or h > height or covers(rows, (x, y, x + w, y + h)):
            continue
        image[y : y + h, x : x + w] = other[0][y1:y2, x1:x2]
        rows.append(np.array([row[0], x, y, x + w, y + h, row[5]], np.float32))
    return image, np.array(rows, np.float32).reshape(-1, 6)


def covers(rows: list[NDArray[np.float32]], box: tuple[int, int, int, int]) -> bool:
    """Tell whether `box` would hide more than `FREE` of any row's box."""
    for row in rows:
        width = min(row[3], box[2]) - max(row[1], box[0])
        height = min(row[4], box[3]) - max(row[2], box[1])
        if width > 0 < height and width * height > FREE * (row[3] - row[1]) * (row[4] - row[2]):
            return True
    return False
