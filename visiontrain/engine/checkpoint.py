"""Checkpoints: directories that are complete or absent, checked when read, without pickle."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as decode_tensors
from safetensors.torch import save as encode_tensors

from visiontrain.core.errors import CheckpointError
from visiontrain.core.interfaces import StateDict
from visiontrain.engine.durable import (
    replace_file,
    require_space,
    storing,
    sync_folder,
    write_file,
)

SCHEMA = 1
PARTS = ("model", "ema", "optimizer", "strategy")
FILES = ("meta.json", *(f"{part}.safetensors" for part in PARTS), "progress.json")
MANIFEST = "MANIFEST"  # lines as sha256sum writes them: `sha256sum -c MANIFEST` checks by hand
POINTER = "last"
NAME = re.compile(r"(?:\.old-)?step-\d+")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a run needs to go on."""

    step: int
    meta: Mapping[str, Any]  # what must not change: model, classes; and who wrote it
    tensors: Mapping[str, StateDict]  # for each of PARTS: whole tensors by name, on the CPU
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
        with storing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            files = encode(snapshot)
            final = self.folder / f"step-{snapshot.step:06d}"
            draft = self.folder / f".part-{final.name}"
            shutil.rmtree(draft, ignore_errors=True)
            require_space(self.folder, sum(map(len, files.values())))
            try:
                self._write(draft, files)
                self._publish(draft, final)
            except OSError:
                shutil.rmtree(draft, ignore_errors=True)  # half a checkpoint only takes space
                raise
            replace_file(self.folder / POINTER, f"{final.name}\n".encode())
            self.leave_future(snapshot.step)
            self.prune(snapshot.step)
        return final

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

    def _write(self, draft: Path, files: Mapping[str, bytes]) -> None:
        draft.mkdir()
        for name, data in files.items():
            write_file(draft / name, data)
        sync_folder(draft)

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
        for path in [*past[self.keep :], *self.folder.glob(".part-*")]:
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


def encode(snapshot: Snapshot) -> dict[str, bytes]:
    """Turn a snapshot into the files of its directory, the manifest last."""
    files = {"meta.json": _json({"schema": SCHEMA, "step": snapshot.step, **snapshot.meta})}
    for part in PARTS:
        tensors = {name: t.contiguous() for name, t in snapshot.tensors.get(part, {}).items()}
        files[f"{part}.safetensors"] = encode_tensors(tensors, {"format": "pt"})
    files["progress.json"] = _json(snapshot.progress)
    lines = [f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items()]
    return {**files, MANIFEST: "".join(lines).encode()}


def read(path: Path) -> Snapshot:
    """Read the checkpoint directory `path`, checking every byte.

    Raises:
        CheckpointError: when a file is missing or not what was written.
    """
    try:
        manifest = (path / MANIFEST).read_text(encoding="ascii")
        hashes = {line[66:]: line[:64] for line in manifest.splitlines()}
        files = {name: (path / name).read_bytes() for name in FILES}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: incomplete ({error}); an older one is used") from error
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != hashes.get(name):
            raise CheckpointError(
                f"{path / name}: its sha256 is not the one in {MANIFEST}; an older one is used"
            )
    meta = json.loads(files["meta.json"])
    if meta["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {meta['schema']}, this version reads {SCHEMA}; use the version "
            "that wrote it"
        )
    tensors = {part: decode_tensors(files[f"{part}.safetensors"]) for part in PARTS}
    return Snapshot(meta["step"], meta, tensors, json.loads(files["progress.json"]))


def _json(value: Mapping[str, Any]) -> bytes:
    """Encode; floats keep every bit, as Python writes the shortest text that reads back equal."""
    return (json.dumps(value, indent=1) + "\n").encode()
