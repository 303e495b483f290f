"""Cache files that are complete or absent, and where they lie by default."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def cache_folder(chosen: str | None) -> Path:
    """Return `chosen`, or the platform's folder for caches of this user."""
    if chosen is not None:
        return Path(os.path.expanduser(chosen))  # noqa: PTH111 - Path's raises on an unknown user
    home = Path.home()
    folders = {"darwin": home / "Library/Caches", "win32": home / "AppData/Local"}
    return folders.get(sys.platform, home / ".cache") / "visiontrain"


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends well, and leaves nothing if not.

    Processes that write the same path at once each write their own; the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, or leave `path` as it is where that is impossible."""
    # A cache that cannot be kept (full disk, read-only home) costs time, never a run.
    with suppress(OSError), written(path) as file:
        file.write(data)
