"""Checkpoints: directories that are complete or absent, checked when read, without pickle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from torch import Tensor

from visiontrain.core.durable import (
    digest_of,
    replace_file,
    require_space,
    storing,
    sync_folder,
    write_file,
)
from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.engine.shards import open_shards, shards_among, wait_for_shards
from visiontrain.engine.tensor_file import open_tensors, write_tensors

SCHEMA = 1
PARTS = ("model", "ema", "optimizer", "strategy")
WHOLE = {part: f"{part}.safetensors" for part in PARTS}  # where processes wrote no shards
SMALL = ("meta.json", "progress.json")
MANIFEST = "MANIFEST"  # lines as sha256sum writes them: `sha256sum -c MANIFEST` checks by hand
POINTER = "last"
DRAFT = ".part-"
NAME = re.compile(r"(?:\.old-)?step-\d+")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a run needs to go on."""

    step: int
    meta: Mapping[str, Any]  # what must not change: model, classes; and who wrote it
    tensors: Mapping[str, Mapping[str, Tensor]]  # for each of PARTS: whole ones by name, on the CPU
    progress: Mapping[str, Any]  # JSON: where the run stands


@dataclass(frozen=True, slots=True)
class Found:
    """The newest good checkpoint, and why newer ones were passed over."""

    snapshot: Snapshot
    path: Path
    rejected: tuple[str, ...]  # one line each


class CheckpointStore:
    """The `checkpoints/` folder of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint, point `last` at it, drop all but the newest `keep`.

        Nothing old is removed before the new directory is complete and on the disk.

        Raises:
            StorageError: when it cannot be written; older checkpoints are untouched.
        """
        size = sum(t.nbytes for named in snapshot.tensors.values() for t in named.values())
        draft = self.begin(snapshot.step, size)
        with self._filling(draft):
            hashes = {
                name: write_tensors(draft / name, snapshot.tensors.get(part, {}), {"format": "pt"})
                for part, name in WHOLE.items()
            }
        return self._finish(draft, snapshot, hashes)

    def complete(self, draft: Path, snapshot: Snapshot, world: int, give_up: Event) -> Path:
        """Wait for what `world` processes write into a draft, and make a checkpoint of it.

        Args:
            draft: what `begin` returned, and the others were told.
            snapshot: without tensors.
            world: how many write.
            give_up: set when one of them will not come.

        Raises:
            StorageError: as of `save`, also when another process could not write.
        """
        with self._filling(draft):
            hashes = wait_for_shards(draft, world, give_up)
        return self._finish(draft, snapshot, hashes)

    def begin(self, step: int, size: int) -> Path:
        """Make room for a checkpoint of `size` bytes and return the folder to write it in.

        Raises:
            StorageError: when there is no room.
        """
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            draft = self.folder / f"{DRAFT}step-{step:06d}"
            shutil.rmtree(draft, ignore_errors=True)
            require_space(self.folder, size)
            draft.mkdir()
        return draft

    def _finish(self, draft: Path, snapshot: Snapshot, hashes: Mapping[str, str]) -> Path:
        """Complete a draft that has its tensors, the manifest last, and give it its name."""
        final = self.folder / draft.name.removeprefix(DRAFT)
        about = {"schema": SCHEMA, "step": snapshot.step, **snapshot.meta}
        with self._filling(draft):
            small = {"meta.json": about, "progress.json": snapshot.progress}
            own = {name: write_file(draft / name, _json(value)) for name, value in small.items()}
            lines = [f"{digest}  {name}\n" for name, digest in (*own.items(), *hashes.items())]
            write_file(draft / MANIFEST, "".join(lines).encode())
            sync_folder(draft)
            self._publish(draft, final)
        with storing(self.folder):
            replace_file(self.folder / POINTER, f"{final.name}\n".encode())
            self.leave_future(snapshot.step)
            self.prune(snapshot.step)
        return final

    @contextmanager
    def _filling(self, draft: Path) -> Iterator[None]:
        """Leave no draft when writing fails: half a checkpoint only takes space."""
        try:
            with storing(self.folder):
                yield
        except StorageError:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def newest(self) -> Found | None:
        """Load the newest checkpoint whose files are all intact; None when there is none.

        Raises:
            CheckpointError: when there are checkpoints but none is intact.
        """
        rejected: list[str] = []
        for path in self._candidates():
            try:
                return Found(read(path), path, tuple(rejected))
            except CheckpointError as error:
                rejected.append(str(error))
        if rejected:
            raise CheckpointError(
                f"{self.folder}: no intact checkpoint ({rejected[0]}); start again in a new folder"
            )
        return None

    def __bool__(self) -> bool:
        return next(self._candidates(), None) is not None

    def _candidates(self) -> Iterator[Path]:
        """List checkpoints, newest first; a replaced one only counts after its successor."""
        if not self.folder.is_dir():
            return
        found = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name)]
        steps = [(_step_of(path), not path.name.startswith("."), path) for path in found]
        yield from (path for *_, path in sorted(steps, reverse=True))

    def _publish(self, draft: Path, final: Path) -> None:
        """Give a complete directory its name, moving one of the same step out of the way."""
        old = final.with_name(f".old-{final.name}")
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        draft.rename(final)
        sync_folder(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def prune(self, step: int) -> None:
        """Keep the newest of those up to `step`, and no draft that a killed run left."""
        past = [path for path in self._candidates() if _step_of(path) <= step]
        for path in past[self.keep :]:
            shutil.rmtree(path, ignore_errors=True)
        self.drop_drafts()

    def drop_drafts(self) -> None:
        """Remove what was never completed, while nobody writes."""
        for path in self.folder.glob(f"{DRAFT}*"):
            shutil.rmtree(path, ignore_errors=True)

    def leave_future(self, step: int) -> None:
        """Drop those later than `step`, once a run that went on from before them has saved.

        Not earlier: what could not be read a moment ago may be read by the next attempt.
        """
        for path in list(self._candidates()):
            if _step_of(path) > step:
                shutil.rmtree(path, ignore_errors=True)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def read(path: Path, *, verify: bool = True) -> Snapshot:
    """Open the checkpoint directory `path`, checking every byte first.

    Tensors are read from the disk when they are asked for.

    Args:
        path: the directory.
        verify: whether to compare hashes; one process does that for all.

    Raises:
        CheckpointError: when a file is missing or not what was written.
    """
    try:
        manifest = (path / MANIFEST).read_text(encoding="ascii")
        hashes = {line[66:]: line[:64] for line in manifest.splitlines()}
        shards = shards_among(hashes)
        names = [*SMALL, *(shards or WHOLE.values())]
        found = {name: digest_of(path / name) for name in names} if verify else hashes
        meta, progress = (json.loads((path / name).read_bytes()) for name in SMALL)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: incomplete ({error}); an older one is used") from error
    for name in names:
        if found[name] != hashes.get(name):
            raise CheckpointError(
                f"{path / name}: its sha256 is not the one in {MANIFEST}; an older one is used"
            )
    if meta["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {meta['schema']}, this version reads {SCHEMA}; use the version "
            "that wrote it"
        )
    return Snapshot(meta["step"], meta, _open(path, shards), progress)


def _open(path: Path, shards: Sequence[str]) -> dict[str, Mapping[str, Tensor]]:
    if not shards:
        return {part: open_tensors(path / name) for part, name in WHOLE.items()}
    opened = open_shards(path, shards)
    return {part: opened.get(part, {}) for part in PARTS}


def _json(value: Mapping[str, Any]) -> bytes:
    """Encode; floats keep every bit, as Python writes the shortest text that reads back equal."""
    return (json.dumps(value, indent=1) + "\n").encode()
