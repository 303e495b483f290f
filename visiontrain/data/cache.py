"""Decoded images kept in memory, or in one file outside the user's data."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.core.interfaces import ImageSource
from visiontrain.data.atomic import written
from visiontrain.data.header import ImageError
from visiontrain.data.images import FileImages, Pixels
from visiontrain.data.scan import fingerprint
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.table import Table

MAGIC = b"visiontrain-cache-1\n"
VERSION = 1  # of how images are decoded; a change makes cache files void
PAGE = mmap.ALLOCATIONGRANULARITY  # pixels start at a multiple of it


def keep_images(table: Table, kind: str, folder: Path) -> Table:
    """Return `table` with its images read from a cache: `none`, `ram` or `disk`."""
    if kind == "ram":
        return replace(table, images=RamCache(table.images, table.sizes))
    if kind == "disk" and isinstance(table.images, FileImages | ShardImages):
        key = key_of(table.images)
        return replace(table, images=DiskCache(table.images, table.sizes, folder, key))
    return table  # composed scenes have no files to spare; a cache on disk gains nothing


def key_of(images: FileImages | ShardImages) -> str:
    """Hash which images these are, and how they are decoded."""
    if isinstance(images, ShardImages):
        return images.fingerprint(VERSION)
    return fingerprint(images.paths, images.max_pixels, VERSION)


def spans(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return where each image starts in a flat buffer, and where the last ends (N + 1,)."""
    return np.concatenate([[0], np.cumsum(np.prod(sizes.astype(np.int64), axis=1) * 3)])


class RamCache:
    """An ImageSource that decodes everything once, into one flat buffer.

    Forked loader processes share the buffer; an unreadable image stays an error.
    """

    def __init__(self, source: ImageSource, sizes: NDArray[np.int32]) -> None:
        self.source = source
        self.sizes = sizes
        self.offsets = spans(sizes)
        total = int(self.offsets[-1])
        try:
            self.pixels = np.empty(total, np.uint8)
        except MemoryError as error:
            other = "disk" if isinstance(source, FileImages | ShardImages) else "none"
            raise DataError(
                f"data.cache=ram: {total / 2**30:.1f} GiB do not fit in memory; use "
                f"data.cache={other}"
            ) from error
        self.good = np.zeros(len(source), np.bool_)
        for row in range(len(source)):
            image = decoded(source, row, sizes)
            if image is not None:
                self.pixels[self.offsets[row] : self.offsets[row + 1]] = image.ravel()
                self.good[row] = True

    def __len__(self) -> int:
        return len(self.source)

    def name(self, row: int) -> str:
        """Name image `row` as its source does."""
        return self.source.name(row)

    def read(self, row: int) -> Pixels:
        """Return a copy of image `row` (H, W, 3)."""
        if not self.good[row]:
            return self.source.read(row)  # raises, and says why
        width, height = self.sizes[row].tolist()
        flat = self.pixels[self.offsets[row] : self.offsets[row + 1]]
        return flat.reshape(height, width, 3).copy()


@dataclass(frozen=True, slots=True)
class Index:
    """The head of a cache file."""

    pixels: int  # where the first image starts
    sums: NDArray[np.uint32]  # (N,): CRC-32 of each image
    good: NDArray[np.bool_]  # (N,): it could be decoded


class DiskCache:
    """An ImageSource that decodes everything once, into one memory-mapped file.

    The file is `folder/images-KEY.u8`: magic, SHA-256 of the head, the head as JSON, pixels.
    The head is verified when the file is opened, an image when it is first read; a damaged
    image is decoded from its source, a damaged head means the file is written again. Nothing
    is ever deleted here: the folder is a cache, empty it when you like.
    """

    def __init__(
        self, source: ImageSource, sizes: NDArray[np.int32], folder: Path, key: str
    ) -> None:
        self.source = source
        self.sizes = sizes
        self.offsets = spans(sizes)
        self.path = folder / f"images-{key}.u8"
        index = self._open()
        if index is None:
            self._write()
            index = self._open()
        if index is None:
            raise DataError(
                f"{self.path}: unreadable just after writing; use another data.cache_dir"
            )
        self.index = index
        self.verified = np.zeros(len(source), np.bool_)
        self.pixels = self._map()

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be copied into every spawned loader process.
        return {name: value for name, value in vars(self).items() if name != "pixels"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self.pixels = self._map()

    def name(self, row: int) -> str:
        """Name image `row` as its source does."""
        return self.source.name(row)

    def read(self, row: int) -> Pixels:
        """Return a copy of image `row` (H, W, 3)."""
        if not self.index.good[row]:
            return self.source.read(row)  # raises, and says why
        width, height = self.sizes[row].tolist()
        flat = np.array(self.pixels[self.offsets[row] : self.offsets[row + 1]])
        if not self.verified[row]:
            if zlib.crc32(flat.data) != self.index.sums[row]:
                return self.source.read(row)
            self.verified[row] = True
        return flat.reshape(height, width, 3)

    def _map(self) -> NDArray[np.uint8]:
        if not self.offsets[-1]:
            return np.empty(0, np.uint8)
        shape = (int(self.offsets[-1]),)
        return np.memmap(self.path, np.uint8, "r", offset=self.index.pixels, shape=shape)

    def _open(self) -> Index | None:
        """Read and verify the head; None where there is no good file."""
        try:
            with self.path.open("rb") as file:
                return self._head(file)
        except (OSError, ValueError, KeyError):
            return None

    def _head(self, file: BinaryIO) -> Index:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError("no cache file")
        digest, length = file.read(32), int.from_bytes(file.read(8), "little")
        text = file.read(min(length, self.path.stat().st_size))
        if hashlib.sha256(text).digest() != digest:
            raise ValueError("damaged head")
        head = json.loads(text)
        index = Index(
            head["pixels"], np.array(head["sums"], np.uint32), np.array(head["good"], np.bool_)
        )
        if self.path.stat().st_size != index.pixels + self.offsets[-1]:
            raise ValueError("truncated")
        if len(index.good) != len(self.source):
            raise ValueError("another data set")
        return index

    def _write(self) -> None:
        """Decode every image into a new file; the head, at the front, is filled in last."""
        count = len(self.source)
        # The head's length is known before its content: ten digits per sum at most, `true, `.
        room = len(MAGIC) + 40 + 200 + count * 20
        start = -(-room // PAGE) * PAGE
        sums, good = np.zeros(count, np.uint32), np.zeros(count, np.bool_)
        try:
            with written(self.path) as file:
                for row in range(count):
                    image = decoded(self.source, row, self.sizes)
                    if image is not None:
                        file.seek(start + int(self.offsets[row]))
                        file.write(image.data)
                        sums[row], good[row] = zlib.crc32(image.data), True
                file.truncate(start + int(self.offsets[-1]))
                file.seek(0)
                file.write(_head_bytes(start, sums, good))
        except OSError as error:
            size = (start + int(self.offsets[-1])) / 2**30
            raise DataError(
                f"data.cache=disk: cannot write {size:.1f} GiB to {self.path} ({error.strerror}); "
                "make room, set data.cache_dir, or use data.cache=none"
            ) from error


def _head_bytes(start: int, sums: NDArray[np.uint32], good: NDArray[np.bool_]) -> bytes:
    head = {"version": VERSION, "pixels": start, "sums": sums.tolist(), "good": good.tolist()}
    text = json.dumps(head).encode()
    return MAGIC + hashlib.sha256(text).digest() + len(text).to_bytes(8, "little") + text


def decoded(source: ImageSource, row: int, sizes: NDArray[np.int32]) -> Pixels | None:
    """Return image `row`; None when it cannot be read, or has changed since it was scanned."""
    try:
        image = source.read(row)
    except ImageError:
        return None
    return image if image.shape[1::-1] == tuple(sizes[row].tolist()) else None
