"""Find pictures that are almost the same: re-encoded, resized, brightened, frames of one film.

N pictures. Two are twins when their difference hashes differ in few bits and, what keeps false
alarms rare, their small copies hardly differ once each has the same brightness in each colour, and
the same contrast.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
SIDE = 16  # of small copies, pixels
BITS = 8  # of 64 that may differ
BANDS = tuple((7 * k, 7 if k < 8 else 8) for k in range(9))  # start, bits: one more than may differ
APART = 0.3  # mean difference of small copies whose contrast is 1
ALIKE = 1 / 3  # of how far apart pictures of the set are: what is nearer is no coincidence
SURELY = 0.06  # apart, nearer than which any two are twins
SAMPLE = 256  # pictures that tell how far apart those of the set are
PLAIN = 4.0  # contrast below which a picture says nothing, of 255
NEIGHBOURS = 300  # of a picture that it is compared with, by band: of one film there may be more
CHUNK = 4096  # pictures made comparable at a time


def small_copy(image: Pixels) -> Pixels:
    """Return a picture (H, W, 3) as (16, 16, 3), averaged."""
    return np.asarray(cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def difference_hash(image: Pixels) -> int:
    """Return 64 bits: whether each of 9 x 8 averaged cells is darker than that to its right.

    Krawetz 2013, "Kind of Like That" (hackerfactor.com/blog, entry 529).
    """
    small = cv2.resize(image, (9, 8), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    bits = np.packbits(grey[:, :-1] < grey[:, 1:])
    return int.from_bytes(bits.tobytes(), "big")


@dataclass(frozen=True, slots=True)
class Twins:
    """What resembles what."""

    other: Rows  # (N,): the nearest twin in an earlier split, -1 for none
    apart: Floats  # (N,): how far they are apart
    inside: NDArray[np.bool_]  # (N,): has a twin in its own split


def find_twins(hashes: NDArray[np.uint64], copies: Pixels, split: Rows) -> Twins:
    """Find the twins of every picture.

    Twins agree in one band of bits at least, and in how much brighter the upper half is as nearly
    as in pixels. So pictures are sorted by band and that, and each is compared with those after
    it until they are too far: time grows with N and with the twins there are.

    Args:
        hashes: of all pictures (N,).
        copies: small copies (N, 16, 16, 3).
        split: the number of each one's split (N,), in the order they are read.
    """
    count = len(hashes)
    contrast, tilt = _measures(copies)
    found = Twins(np.full(count, -1), np.full(count, np.inf), np.zeros(count, np.bool_))
    telling = np.flatnonzero(contrast >= PLAIN)
    limit = _limit(copies, telling)
    masks = [np.uint64((2**width - 1) << start) for start, width in BANDS]
    for mask in masks:
        band = hashes & mask
        order = telling[np.lexsort((tilt[telling], band[telling]))]
        first = np.arange(len(order))  # places in `order` that are still compared
        for step in range(1, NEIGHBOURS + 1):
            first = first[first < len(order) - step]
            a, b = order[first], order[first + step]
            near = (band[a] == band[b]) & (tilt[b] - tilt[a] <= limit)
            first, a, b = first[near], a[near], b[near]
            if not len(first):
                break
            differ = hashes[a] ^ hashes[b]
            close = _bits(differ) <= BITS
            for earlier in masks[: masks.index(mask)]:  # which has compared this pair
                close &= (differ & earlier) != 0
            pairs = a[close], b[close]
            apart = _apart(copies, *pairs)
            _note(found, pairs, np.where(apart <= limit, apart, np.inf), split)
    return found


def _comparable(copies: Pixels) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return small copies of mean 0 in each colour and contrast 1, and what their contrast was."""
    centred = copies.astype(np.float32)
    centred -= centred.mean(axis=(1, 2), keepdims=True)
    contrast = centred.std(axis=(1, 2, 3))
    return centred / np.maximum(contrast, 1)[:, None, None, None], contrast


def _measures(copies: Pixels) -> tuple[Floats, Floats]:
    """Return the contrast of each, and how much brighter its upper half is, halved."""
    contrast, tilt = np.zeros(len(copies)), np.zeros(len(copies))
    for start in range(0, len(copies), CHUNK):
        part = slice(start, start + CHUNK)
        even, contrast[part] = _comparable(copies[part])
        tilt[part] = even[:, : SIDE // 2].mean(axis=(1, 2, 3))
    return contrast, tilt


def _limit(copies: Pixels, telling: Rows) -> float:
    """Return how near twins are in this set.

    In most sets a picture's nearest in a sample is 0.73 to 0.75 apart (CIFAR-10, BCCD, composed
    scenes), and pictures less than 0.25 apart were the same scene to the eye. Single digits of
    8 x 8 pixels are 0.24 apart: no two of them are twins for being so near.
    """
    rows = np.random.default_rng(0).permutation(telling)[:SAMPLE]
    if len(rows) < 2:
        return APART
    even, _ = _comparable(copies[rows])
    nearest = [
        np.abs(np.delete(even, k, axis=0) - own).mean(axis=(1, 2, 3)).min()
        for k, own in enumerate(even)
    ]
    return float(np.clip(ALIKE * np.median(nearest), SURELY, APART))


def _apart(copies: Pixels, a: Rows, b: Rows) -> Floats:
    """Return how far pairs of small copies are apart."""
    apart = np.zeros(len(a))
    for start in range(0, len(a), CHUNK):  # of films nearly all pictures have one that is close
        part = slice(start, start + CHUNK)
        (first, _), (second, _) = _comparable(copies[a[part]]), _comparable(copies[b[part]])
        apart[part] = np.abs(first - second).mean(axis=(1, 2, 3))
    return apart


def _note(found: Twins, pairs: tuple[Rows, Rows], apart: Floats, split: Rows) -> None:
    """Keep the nearest twin in an earlier split of each; those at infinity are none."""
    a, b = pairs
    inside = (split[a] == split[b]) & np.isfinite(apart)
    found.inside[a[inside]] = found.inside[b[inside]] = True
    for late, early in ((a, b), (b, a)):
        better = (split[early] < split[late]) & (apart < found.apart[late])
        found.other[late[better]], found.apart[late[better]] = early[better], apart[better]


def _bits(values: NDArray[np.uint64]) -> Rows:
    """Count the bits that are set in each (numpy 1 has no function for it)."""
    return np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1, dtype=np.int64)
