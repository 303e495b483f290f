"""Shards: tars in WebDataset's layout, read at random through an index of where images lie."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.atomic import replace_file
from visiontrain.data.defects import counted
from visiontrain.data.description import SPLITS, Choice, Description
from visiontrain.data.images import Paths
from visiontrain.data.remote import GB, ShardStore, is_remote
from visiontrain.data.scan import fingerprint
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.shard_index import index_bytes, read_index, rows_of
from visiontrain.data.shard_table import Assembly, without_repeats
from visiontrain.data.table import Defect, Table
from visiontrain.data.tar_scan import TarScan, scan_tar
from visiontrain.data.windows import windows_of

KEYS = ("path", *SPLITS, "validation", "names", "nc", "index", "several")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")  # of WebDataset: train-{000000..000099}.tar
MOST = 1_000_000  # tars that a pattern may stand for
VERSION = 5  # of how tars are read; a change makes kept indices void
THREADS = 4  # that read through tars


class ShardReader:
    """Splits of tars, each with an index (`index: {train: train.index}`), or read through once."""

    def __init__(self, description: Description) -> None:
        description.check_keys(KEYS)
        self.description = description
        self.root = description.root()
        self.store = ShardStore(description.cache, description.shard_cache_gb)
        self.splits: Mapping[str, Any] = {
            split: tuple(self._tars(split, entries))
            for split, entries in description.sources().items()
        }
        self.indices = self._indices()
        self._given = description.names()
        self._tables: dict[str, Table] = {}
        first = self._table(next(iter(self.splits)))
        self.names = self._given or first.names
        self.task, self.several = str(first.task), first.several
        self.notes = tuple(self._notes(first))

    @property
    def remote(self) -> bool:
        """Tell whether something is read from a URL."""
        places = (place for tars in self.splits.values() for place in tars)
        return any(is_remote(place) for place in (*places, *self.indices.values()))

    def read(self, split: str, choice: Choice) -> Table:
        """Return the images of `split`; nothing is read but the index, where there is one."""
        table = self._usable(self._table(split))
        if table.task != self.task:
            raise DataError(f"{self.splits[split][0]}: {table.task}, other splits: {self.task}")
        if table.names != self.names:
            raise self._other_names(split, table.names)
        table = rows_of(table, choice.rows(len(table)) if len(table) else np.arange(0))
        images = cast("ShardImages", table.images)
        return replace(table, windows=windows_of(images.starts, self.description.window))

    def _other_names(self, split: str, names: Sequence[str]) -> DataError:
        """Say that an index has classes which are others, or in another order."""
        first = next(iter(self.splits))
        at = next(k for k in range(len(names) + 1) if names[: k + 1] != self.names[: k + 1])
        one, two = (repr(found[at]) if at < len(found) else "none" for found in (names, self.names))
        return DataError(
            f"{self.indices[split]}: class {at} is {one}, in {first} it is {two}; shard the splits "
            "together, or name the classes with names:"
        )

    def _table(self, split: str) -> Table:
        """Return all that the tars of `split` are said to hold."""
        if split not in self._tables:
            tars = self.splits[split]
            if split in self.indices:
                table = self._indexed(split, tars)
            else:
                table = self._scanned(split, tars)
            self._tables[split] = table
        return self._tables[split]

    def _indexed(self, split: str, tars: Sequence[str]) -> Table:
        place = self.indices[split]
        path = Path(self.store.local(place))
        table = read_index(path, tars, self.store, self.description.max_pixels)
        if is_remote(place):
            self.store.note_index(tars, path)
        self._check_several(table, place)
        names = self._given or table.names
        if len(names) != len(table.names):
            got = f"{counted(len(names), 'name')}, but {place} has {len(table.names)}"
            raise self.description.fail("names", got, "make them agree")
        table = replace(table, names=names)
        single = self.description.single_cls and table.task == "detect"
        return without_repeats(table) if single else table

    def _check_several(self, table: Table, place: str) -> None:
        """Refuse `several:` where the index says otherwise: it was settled when that was made."""
        said = self.description.values.get("several")
        if said is not None and table.task == "classify" and said != table.several:
            got = f"{said!r}, but the index {place} says {str(table.several).lower()}"
            raise self.description.fail("several", got, "leave it out, or index the tars anew")

    def _scanned(self, split: str, tars: Sequence[str]) -> Table:
        """Read through tars once; what is found is kept while none of them changes."""
        first = next(iter(self.splits))
        names = self._given or (self._table(first).names if split != first else None)
        settings = (names, self.description.single_cls, self.description.values.get("several"))
        key = fingerprint(Paths(tars), self.description.max_pixels, VERSION, *settings)
        kept = self.description.cache / f"{key}.shards"
        self.store.note_index(tars, kept)
        if kept.is_file():
            with suppress(DataError):  # a damaged one is made anew
                return read_index(kept, tars, self.store, self.description.max_pixels)
        with ThreadPoolExecutor(THREADS) as pool:
            scans = list(pool.map(self._scan, tars))
        table = Assembly(tars, scans, names, self.store, self.description).table()
        if not any(defect.kind == "unreadable-shard" for defect in table.defects):
            replace_file(kept, index_bytes(table))
        return table

    def _scan(self, tar: str) -> TarScan:
        return scan_tar(partial(self.store.open, tar), tar, self.description.max_pixels)

    def _usable(self, table: Table) -> Table:
        """Leave out what the tars cannot hold, and images that are too large."""
        images = cast("ShardImages", table.images)
        lengths, defects = _tar_lengths(images)
        fits = images.offsets + images.lengths <= np.repeat(lengths, np.diff(images.starts))
        pixels = np.prod(table.sizes.astype(np.int64), axis=1)
        huge = fits & (pixels > images.max_pixels)
        defects += [
            Defect(images.name(row), None, "huge-image", f"{pixels[row]:,} pixels")
            for row in np.flatnonzero(huge).tolist()
        ]
        table = rows_of(table, np.flatnonzero(fits & ~huge))
        return replace(table, defects=(*table.defects, *defects)) if defects else table

    def _notes(self, table: Table) -> Iterator[str]:
        """Say when copies of remote tars would be fetched again and again."""
        images = cast("ShardImages", table.images)
        remote = [is_remote(tar) for tar in images.tars]
        window = self.description.window
        held = np.sort(images.tar_sizes[remote])[-window:].sum()
        if held > self.store.limit:
            yield (
                f"{self.description.where}: {window} tars, which are read at a time, have "
                f"{held / GB:.3g} GB, but data.shard_cache_gb={self.store.limit / GB:g}: they "
                "would be fetched again and again; raise it, or lower data.window"
            )

    def _indices(self) -> Mapping[str, str]:
        value = self.description.values.get("index", {})
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise self.description.fail("index", f"got {value!r}", "give a file per split")
        for split in value:
            if split not in self.splits:
                got = f"a file for {split!r}, which is no split here"
                raise self.description.fail("index", got, f"there are {', '.join(self.splits)}")
        return {split: self._place(entry) for split, entry in value.items()}

    def _place(self, entry: str) -> str:
        return entry if is_remote(entry) else os.path.abspath(self.root / entry)  # noqa: PTH100

    def _tars(self, split: str, entries: Sequence[str]) -> Iterator[str]:
        """Expand patterns: `{000..099}` anywhere, `*` and `?` in local paths."""
        for entry in entries:
            for name in braces(entry):
                place = self._place(name)
                if is_remote(place) or not glob.has_magic(place):
                    yield place
                    continue
                found = sorted(glob.glob(place))  # noqa: PTH207 - of an absolute pattern
                if not found:
                    raise DataError(
                        f"{self.description.where}: {split}: no tar at {place}; correct the path"
                    )
                yield from found


def braces(pattern: str) -> list[str]:
    """Expand `{000..099}` to all numbers between, of as many digits.

    Raises:
        ConfigError: they are too many, or none.
    """
    spans = [(int(first), int(last)) for first, last in BRACES.findall(pattern)]
    for first, last in spans:
        if last < first:
            raise ConfigError(f"{pattern}: no number from {first} to {last}; swap them")
    tars = math.prod(last - first + 1 for first, last in spans)
    if tars > MOST:
        raise ConfigError(f"{pattern}: {tars:,} tars; give a pattern of at most {MOST:,}")
    return list(_expanded(pattern))


def _expanded(pattern: str) -> Iterator[str]:
    found = BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    after = list(_expanded(pattern[found.end() :]))
    for number in range(int(found[1]), int(found[2]) + 1):
        start = f"{pattern[: found.start()]}{number:0{len(found[1])}d}"
        yield from (start + rest for rest in after)


def _tar_lengths(images: ShardImages) -> tuple[NDArray[np.int64], list[Defect]]:
    """Return how much of each tar there is (S,), 0 for one that is not the indexed one."""
    lengths, defects = images.tar_sizes.copy(), []
    for number, tar in enumerate(images.tars):
        if is_remote(tar) or images.starts[number] == images.starts[number + 1]:
            continue
        reason, kind = "", "unreadable-shard"
        try:
            size = Path(tar).stat().st_size
        except OSError as error:
            size, reason = 0, f"cannot be read ({error.strerror or error})"
        said = int(images.tar_sizes[number])
        if size > said:
            reason = f"has {size:,} bytes, its index says {said:,}; shard again, or remove `index:`"
        elif size < said and not reason:
            kind, reason = "truncated-shard", f"ends after {size:,} of {said:,} bytes"
        if reason:
            lengths[number] = 0 if kind == "unreadable-shard" else size
            defects.append(Defect(tar, None, kind, reason))
    return lengths, defects
