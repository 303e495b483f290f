"""Read every image of a data set whole, once: what its file and its pixels say."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b

import numpy as np

from visiontrain.core.interfaces import ImageSource
from visiontrain.data import images
from visiontrain.data.defects import DEFECTS
from visiontrain.data.header import ImageError, read_header
from visiontrain.data.images import FileImages
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.table import Defect, Table
from visiontrain.data.twins import Pixels, difference_hash, find_twins, small_copy

THREADS = 8


@dataclass(frozen=True, slots=True)
class Look:
    """What reading one image whole says."""

    digest: bytes  # of the file, or of the pixels where there is none; empty when unreadable
    rotated: bool = False
    defect: Defect | None = None
    hash: int = 0  # `difference_hash`
    copy: Pixels | None = None  # `small_copy`; None where it was not decoded


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture that is in two splits."""

    split: str
    row: int
    other_split: str  # read before `split`
    other_row: int
    apart: float  # 0: the same file


def look_at_all(table: Table, *, decode: bool) -> list[Look]:
    """Read every image of a table, in threads."""
    look = partial(_look, table.images, decode=decode)
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(look, range(len(table))))


def _look(source: ImageSource, row: int, *, decode: bool) -> Look:
    name, pixels = source.name(row), None
    if not isinstance(source, FileImages | ShardImages):
        pixels = source.read(row)
        return _seen(blake2b(pixels.tobytes(), digest_size=16).digest(), pixels)
    try:
        data = source.read_bytes(row)
        digest = blake2b(data, digest_size=16).digest()
        head = read_header(io.BytesIO(data), name, source.max_pixels)
        if decode:
            pixels = images.decode(data, name, source.max_pixels)
    except ImageError as error:
        return Look(b"", defect=Defect(name, None, error.kind, error.reason))
    defect = None
    if decode and head.format == "jpeg" and images.is_hollow(data):
        defect = Defect(name, None, "hollow-image", DEFECTS["hollow-image"][1])
    return _seen(digest, pixels, defect, rotated=head.orientation != 1)


def _seen(
    digest: bytes, pixels: Pixels | None, defect: Defect | None = None, *, rotated: bool = False
) -> Look:
    if pixels is None:
        return Look(digest, rotated, defect)
    return Look(digest, rotated, defect, difference_hash(pixels), small_copy(pixels))


def find_pairs(looks: Sequence[tuple[str, Sequence[Look]]]) -> tuple[list[Pair], dict[str, int]]:
    """Find the pictures that are in two splits, the same or nearly.

    Args:
        looks: at all images of each split, in the order they were read.

    Returns:
        A pair for each picture that was in an earlier split, and for each split how many of its
        pictures have a twin, the same or nearly, in it.
    """
    pairs, again = _copies(looks)
    known = {(pair.split, pair.row) for pair in pairs}
    places = [
        (number, row, look)
        for number, (_, each) in enumerate(looks)
        for row, look in enumerate(each)
        if look.copy is not None
    ]
    if not places:
        return pairs, {split: len(rows) for split, rows in again.items()}
    copies = np.stack([look.copy for _, _, look in places if look.copy is not None])
    hashes = np.array([look.hash for _, _, look in places], np.uint64)
    twins = find_twins(hashes, copies, np.array([number for number, _, _ in places]))
    for k in np.flatnonzero(twins.other >= 0).tolist():
        (number, row, _), (other, other_row, _) = places[k], places[int(twins.other[k])]
        split = looks[number][0]
        if (split, row) not in known:
            pairs.append(Pair(split, row, looks[other][0], other_row, float(twins.apart[k])))
    for k in np.flatnonzero(twins.inside).tolist():
        again[looks[places[k][0]][0]].add(places[k][1])
    return pairs, {split: len(rows) for split, rows in again.items()}


def _copies(
    looks: Sequence[tuple[str, Sequence[Look]]],
) -> tuple[list[Pair], dict[str, set[int]]]:
    """Find pictures that are the same file."""
    seen: dict[bytes, tuple[str, int]] = {}
    pairs, again = [], {split: set[int]() for split, _ in looks}
    for split, each in looks:
        for row, look in enumerate(each):
            if not look.digest:
                continue
            other, other_row = seen.setdefault(look.digest, (split, row))
            if other != split:
                pairs.append(Pair(split, row, other, other_row, 0.0))
            elif other_row != row:
                again[split] |= {row, other_row}
    return pairs, again


def defect_of(pair: Pair, name: str, other: str) -> Defect:
    """Say of a picture in two splits what is wrong."""
    where = f"{other} in {pair.other_split}"
    if not pair.apart:
        return Defect(name, None, "duplicate-image", f"the same as {where}")
    said = f"almost the same as {where} ({pair.apart:.0%} apart)"
    return Defect(name, None, "near-duplicate", said)
