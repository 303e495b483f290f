"""Random numbers as pure functions of who asks: nothing depends on workers, ranks or order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd
MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def derive(*key: int | str) -> int:
    """Hash `key` to 128 bits; equal on every machine and Python version."""
    text = "/".join(map(str, key)).encode("utf-8", "surrogateescape")  # names of any bytes
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """Return numpy's counter-based generator (Philox) for `key`, e.g. (seed, epoch, index)."""
    return np.random.Generator(np.random.Philox(key=derive(*key)))


def uniforms(
    key: tuple[int | str, ...], rows: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Return `count` numbers in [0, 1) for each of `rows` (N,), as (N, count), by `key` and row.

    SplitMix64 by counter (Steele, Lea and Flood 2014), over whole arrays: making a generator for
    every row takes ten times as long as augmenting a picture of 32 pixels.
    """
    counters = rows.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(
        1, count + 1, dtype=np.uint64
    )
    z = counters * np.uint64(GOLDEN) + np.uint64(derive(*key) % 2**64)  # wraps, as below
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX[0])
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX[1])
    z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def python_random(*key: int | str) -> random.Random:
    """Return the standard library's generator for `key`; for libraries that take one."""
    return random.Random(derive(*key))  # noqa: S311 - augmentation, no secrets


def seed_model(*key: int | str) -> None:
    """Seed torch for the layers that draw (dropout, drop path), e.g. by (seed, step, index)."""
    torch.manual_seed(derive("model", *key) % 2**63)
