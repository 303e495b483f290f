"""Writing files so that they are either complete or absent, whenever the power goes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from visiontrain.core.errors import StorageError

Data: TypeAlias = bytes | memoryview

FULL = {errno.ENOSPC, errno.EDQUOT}
MARGIN = 1 << 20  # bytes to leave free for directories and logs


def write_parts(path: Path, parts: Iterable[Data]) -> str:
    """Write parts one after another, wait until they are on the disk; return their sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_file(path: Path, data: bytes) -> str:
    """Write `data` as `write_parts` does."""
    return write_parts(path, (data,))


def digest_of(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` in the place of `path` at once: a reader sees the old file or the new."""
    draft = path.with_name(f".{path.name}.part")
    write_file(draft, data)
    draft.replace(path)
    sync_folder(path.parent)


def to_json(value: Any) -> bytes:
    """Encode for people and scripts: indented; nan, which JSON has no word for, becomes null."""
    return (json.dumps(_known(value), indent=2, allow_nan=False) + "\n").encode()


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _known(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(path: Path) -> None:
    """Wait until the names in the folder `path` are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def require_space(folder: Path, size: int) -> None:
    """Refuse to write `size` bytes that the disk under `folder` has no room for.

    Raises:
        StorageError: when less is free.
    """
    free = shutil.disk_usage(folder).free
    if free < size + MARGIN:
        raise StorageError(
            full_disk(folder, f"{size / 1e6:.1f} MB to write, {free / 1e6:.1f} free")
        )


def full_disk(path: Path, got: str) -> str:
    """Say what a full disk means for the run."""
    return (
        f"{path}: no space left on the disk ({got}); free some space; a training keeps less with "
        "save.keep=1, and goes on with resume=true: what was saved before is intact"
    )


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn a failure to write below `path` into one clear line.

    Raises:
        StorageError: for any OSError inside.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(full_disk(path, error.strerror or "full")) from error
        reason = error.strerror or str(error)
        raise StorageError(
            f"{path}: cannot be written ({reason}); check the disk and permissions; a training "
            "goes on with resume=true"
        ) from error
