"""Pixels from shards: each image by its tar, offset and length; no tar is read through."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from visiontrain.data.header import ImageError
from visiontrain.data.images import Paths, Pixels, decode
from visiontrain.data.remote import ShardStore
from visiontrain.data.scan import fingerprint


@dataclass(frozen=True, slots=True, eq=False)
class ShardImages:
    """An ImageSource of images in S tars. Flat arrays, so that loader processes share them."""

    tars: tuple[str, ...]  # (S,): paths or URLs
    tar_sizes: NDArray[np.int64]  # (S,): bytes of each tar
    starts: NDArray[np.int64]  # (S + 1,): images of tar s are starts[s] : starts[s + 1]
    offsets: NDArray[np.int64]  # (N,): where an image begins in its tar
    lengths: NDArray[np.int64]  # (N,): bytes of an image
    members: Paths  # (N,): their names in the tars
    store: ShardStore
    max_pixels: int

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, row: int) -> Pixels:
        """Decode image `row` (H, W, 3), RGB, upright."""
        return decode(self.read_bytes(row), self.name(row), self.max_pixels)

    def name(self, row: int) -> str:
        """Return the tar and the member: `.../train-000000.tar/000012.jpg`."""
        return f"{self.tars[self.shard(row)]}/{self.members[row]}"

    def shard(self, row: int) -> int:
        """Return which tar holds image `row`."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def read_bytes(self, row: int) -> bytes:
        """Return the image's file; its tar is fetched first where it is remote."""
        shard, length = self.shard(row), int(self.lengths[row])
        tar = self.tars[shard]
        try:
            data = self._slice(tar, int(self.tar_sizes[shard]), int(self.offsets[row]), length)
        except OSError as error:
            reason = f"its tar cannot be read ({error.strerror})"
            raise ImageError(self.name(row), "unreadable-shard", reason) from error
        if len(data) != length:
            raise ImageError(self.name(row), "truncated-shard", "its tar ends before it")
        return data

    def _slice(self, tar: str, size: int, offset: int, length: int) -> bytes:
        handle = self.store.open(tar, size)
        try:
            return os.pread(handle, length, offset)
        finally:
            os.close(handle)

    def select(self, rows: NDArray[np.int64]) -> Self:
        """Return the images of `rows`, ascending."""
        return replace(
            self,
            starts=np.searchsorted(rows, self.starts),
            offsets=self.offsets[rows],
            lengths=self.lengths[rows],
            members=self.members.select(rows),
        )

    def fingerprint(self, *key: object) -> str:
        """Hash which images these are, and `key`."""
        places = zlib.crc32(self.offsets.tobytes() + self.lengths.tobytes() + self.starts.tobytes())
        return fingerprint(Paths(self.tars), self.max_pixels, places, *key)
