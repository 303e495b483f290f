"""Checkpoints that every process writes its own part of, and that any other can read.

A file `shard-00002-of-00003.safetensors` holds the second of three processes' rows of the tensors
that are cut over processes; the first one's also holds those that are not. Its header says
where the rows belong.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from visiontrain.core.durable import replace_file, storing
from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.core.types import Piece
from visiontrain.engine.tensor_file import (
    Stored,
    StoredTensors,
    open_file,
    shape_in,
    write_tensors,
)

KEY = "visiontrain"  # the header's metadata: this key holds one JSON object
NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.safetensors")
WRITTEN, FAILED = ".sha256", ".failed"  # beside a shard, until the checkpoint is complete
LOOK_S = 0.05  # between looks for the others' shards
PATIENCE_S = 600.0  # with the others, who started to write at the same step


@dataclass(frozen=True, slots=True)
class Shard:
    """What one process writes."""

    rank: int
    world: int
    pieces: Mapping[str, Mapping[str, Piece]]  # for each part of a checkpoint, by name

    @property
    def file(self) -> str:
        """Its name."""
        return file_of(self.rank, self.world)


def file_of(rank: int, world: int) -> str:
    """Name the file of a process; people count from 1."""
    return f"shard-{rank + 1:05d}-of-{world:05d}.safetensors"


def write_shard(draft: Path, shard: Shard) -> None:
    """Write a process's part into a checkpoint's draft, and beside it that it is there.

    Raises:
        StorageError: when it cannot be written; a note says so, where there is room for one.
    """
    named = {f"{part}/{name}": p for part, ps in shard.pieces.items() for name, p in ps.items()}
    where = {name: {"shape": list(p.shape), "start": p.start} for name, p in named.items()}
    rows = {name: piece.rows for name, piece in named.items()}
    try:
        with storing(draft):
            digest = write_tensors(draft / shard.file, rows, {KEY: json.dumps(where)})
            replace_file(draft / f"{shard.file}{WRITTEN}", digest.encode())
    except StorageError as error:
        with suppress(OSError):
            (draft / shard.file).unlink(missing_ok=True)  # makes room for the note
            (draft / f"{shard.file}{FAILED}").write_text(str(error), encoding="utf-8")
        raise


def wait_for_shards(draft: Path, world: int, give_up: Event) -> dict[str, str]:
    """Wait until all processes have written their parts; return the files' sha256 by name.

    Through the folder, so that a thread can wait while training uses the group.

    Args:
        draft: where they write.
        world: how many there are.
        give_up: set when one of them will not come.

    Raises:
        StorageError: a process could not write, or did not in time.
    """
    names = [file_of(rank, world) for rank in range(world)]
    end = time.monotonic() + PATIENCE_S
    while missing := [name for name in names if not (draft / f"{name}{WRITTEN}").exists()]:
        # Asked first: who sets it has heard of a failure, whose note is there by then.
        over = give_up.is_set() or time.monotonic() > end
        for name in missing:
            failed = draft / f"{name}{FAILED}"
            if failed.exists():  # empty where there was no room even for that
                why = failed.read_text(encoding="utf-8")
                raise StorageError(why or f"{draft / name}: could not be written; make room")
        if over:
            raise StorageError(
                f"{draft}: {missing[0]} was not written; see whether its process has room and "
                "goes on, then add resume=true"
            )
        give_up.wait(LOOK_S)
    notes = [draft / f"{name}{WRITTEN}" for name in names]
    hashes = {name: note.read_text() for name, note in zip(names, notes, strict=True)}
    for note in notes:
        note.unlink()
    return hashes


def shards_among(names: Iterable[str]) -> list[str]:
    """Return the names of all shards of a checkpoint, given those that its manifest lists.

    Raises:
        ValueError: those listed are of checkpoints of several sizes.
    """
    worlds = {int(found[2]) for name in names if (found := NAME.fullmatch(name))}
    if len(worlds) > 1:
        raise ValueError(f"shards of {sorted(worlds)} processes")
    return [file_of(rank, world) for world in worlds for rank in range(world)]


def open_shards(folder: Path, names: Iterable[str]) -> dict[str, StoredTensors]:
    """Open the shards of a checkpoint; return tensors by part.

    Raises:
        CheckpointError: a file is missing or none of ours, or rows are missing.
    """
    found: dict[str, list[Stored]] = {}
    shapes: dict[str, list[int]] = {}
    for name in names:
        file = open_file(folder / name)
        for key, place in _places(file, folder / name).items():
            piece = Stored(file, key, place["start"], shape_in(file, key)[0])
            found.setdefault(key, []).append(piece)
            shapes[key] = place["shape"] or [1]
    parts: dict[str, dict[str, list[Stored]]] = {}
    for key, pieces in found.items():
        end = 0
        for piece in pieces:  # in the order of ranks, which is that of rows
            end += piece.count if piece.start == end else 0
        if end != shapes[key][0]:
            raise CheckpointError(f"{folder}: rows of {key} are missing; an older one is used")
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = pieces
    return {part: StoredTensors(named) for part, named in parts.items()}


def _places(file: Any, path: Path) -> dict[str, Any]:
    try:
        return json.loads((file.metadata() or {})[KEY])
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its header does not say where its rows belong; an older one is used"
        ) from error
