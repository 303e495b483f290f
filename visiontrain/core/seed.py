"""Random numbers as pure functions of who asks: nothing depends on workers, ranks or order."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def derive(*key: int | str) -> int:
    """Hash `key` to 128 bits; equal on every machine and Python version."""
    text = "/".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """Return numpy's counter-based generator (Philox) for `key`, e.g. (seed, epoch, index)."""
    return np.random.Generator(np.random.Philox(key=derive(*key)))


def python_random(*key: int | str) -> random.Random:
    """Return the standard library's generator for `key`; for libraries that take one."""
    return random.Random(derive(*key))  # noqa: S311 - augmentation, no secrets


def seed_model(*key: int | str) -> None:
    """Seed torch for the layers that draw (dropout, drop path), e.g. by (seed, step, index)."""
    torch.manual_seed(derive("model", *key) % 2**63)
