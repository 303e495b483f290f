"""Erase parts of whole batches of pictures, or mix each with another.

B pictures of S x S pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import uniforms
from visiontrain.data.letterbox import GREY

Pixels = NDArray[np.uint8]  # (B, S, S, 3)
Rectangles = NDArray[np.int64]  # (B, 4): x1, y1, x2, y2; empty where nothing is meant
ERASED = (0.02, 0.33)  # share of the area (Zhong et al. 2020, arXiv 1708.04896)
RATIO = 3.3  # longest side of what is erased over the shortest


def erase(images: Pixels, rows: NDArray[np.int64], key: tuple[int, ...], share: float) -> None:
    """Grey a random rectangle of a `share` of the pictures, in place."""
    if not share:
        return
    chosen, area, ratio, x, y = uniforms((*key, "erase"), rows, 5).T
    side = images.shape[1]
    area = side * side * (ERASED[0] + (ERASED[1] - ERASED[0]) * area)
    ratio = RATIO ** (2 * ratio - 1)
    size = np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], 1).round().clip(1, side)
    corner = (np.stack([x, y], 1) * (side - size + 1)).astype(np.int64)
    where = np.hstack([corner, corner + size.astype(np.int64)])
    for k in np.flatnonzero(chosen < share):
        x1, y1, x2, y2 = where[k]
        images[k, y1:y2, x1:x2] = GREY


@dataclass(frozen=True, slots=True)
class Mixture:
    """Which pictures are mixed with which, and how."""

    mixed: NDArray[np.int64]  # (K,) places in the batch, ascending
    partners: NDArray[np.int64]  # (K,) rows of the table
    share: NDArray[np.float64]  # (K,): how much of the picture's own is left
    cut: NDArray[np.bool_]  # (K,): a rectangle comes from the partner, instead of all, blended
    where: Rectangles  # (K, 4)


def draw_mixture(
    rows: NDArray[np.int64],
    key: tuple[int, ...],
    mixup: float,
    cutmix: float,
    side: int,
    pick: Callable[[NDArray[np.int64], NDArray[np.float64]], NDArray[np.int64]],
) -> Mixture:
    """Draw partners for a batch.

    Shares are uniform (Beta(1, 1)), as in Zhang et al. 2018 (arXiv 1710.09412) on CIFAR and in
    Yun et al. 2019 (arXiv 1905.04899).

    Args:
        rows: of the batch (B,).
        key: seed and epoch.
        mixup: share of samples blended.
        cutmix: share of samples with a rectangle of another.
        side: of a picture.
        pick: turns rows (K,) and numbers in [0, 1) (K,) into their partners.
    """
    kind, partner, share, x, y = uniforms((*key, "mix"), rows, 5).T
    mixed = np.flatnonzero(kind < mixup + cutmix)
    cut = kind[mixed] >= mixup
    centre = np.stack([x, y], 1)[mixed] * side
    half = np.sqrt(1 - share[mixed])[:, None] * side / 2
    where = np.hstack([centre - half, centre + half]).round().clip(0, side).astype(np.int64)
    left = 1 - np.prod(where[:, 2:] - where[:, :2], axis=1) / side**2
    return Mixture(
        mixed,
        pick(rows[mixed], partner[mixed]),
        np.where(cut, left, share[mixed]),
        cut,
        where,
    )


def mix(images: Pixels, others: Pixels, mixture: Mixture) -> None:
    """Put the partners' pictures (K, S, S, 3) into `images`, in place."""
    for k, place in enumerate(mixture.mixed):
        if mixture.cut[k]:
            x1, y1, x2, y2 = mixture.where[k]
            images[place, y1:y2, x1:x2] = others[k, y1:y2, x1:x2]
        else:
            share = mixture.share[k]
            blended = images[place] * share + others[k] * (1 - share)
            images[place] = (blended + 0.5).astype(np.uint8)
