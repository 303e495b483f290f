"""Pictures below a folder, in the same order on every machine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path

from visiontrain.core.errors import DataError
from visiontrain.data.header import OTHER_SUFFIXES, SUFFIXES

PICTURES = SUFFIXES | OTHER_SUFFIXES  # those that are not read become defects, not silence

OF_TOOLS = ("__MACOSX", "@eaDir")  # what a Mac's archives and a Synology's index leave behind

RUNS = "runs"  # where runs go unless told
SIGNED = ("config.yaml", "compare.yaml")  # begin with our name where a run left them
SIGNATURE = b"# visiontrain "
PREDICTIONS = "predictions.json"
PREDICTED = b'{\n "weights"'  # begins it where it is ours
UNFINISHED = "predictions.part{}.jsonl"  # what a process found; a crash leaves it
PART = re.compile(UNFINISHED.format(r"\d+"))


def is_hidden(folder: str) -> bool:
    """Tell by its name whether a folder is no part of a data set, such as .ipynb_checkpoints."""
    return folder.startswith(".") or folder in OF_TOOLS


def is_run(folder: str, files: Collection[str]) -> bool:
    """Tell by its `files` whether visiontrain left a folder: what it drew is no data."""
    signed = {**dict.fromkeys(SIGNED, SIGNATURE), PREDICTIONS: PREDICTED}
    for name, signature in signed.items():
        with suppress(OSError):
            if name in files and _begins(os.path.join(folder, name), signature):  # noqa: PTH118
                return True
    return any(PART.fullmatch(name) for name in files)


def _begins(path: str, signature: bytes) -> bool:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read(len(signature)) == signature


def is_picture(name: str) -> bool:
    """Tell a picture's file from others, by its name."""
    return os.path.splitext(name)[1].lower() in PICTURES and not name.startswith(".")  # noqa: PTH122


def walk(folder: Path, wanted: Callable[[str], bool] = is_picture) -> Iterator[str]:
    """Yield the images, or other `wanted` names, below `folder`, sorted: equal on every machine.

    Links are followed, but no folder is read twice: a link to one above would never end.
    Hidden folders are left out, those that tools leave, and below `folder` those of runs.

    Raises:
        DataError: a folder cannot be listed: its pictures would be missing without a word.
    """
    # os.path throughout: a Path for each of a million images is slow.
    seen: set[tuple[int, int]] = set()
    start = str(folder)
    for parent, folders, files in os.walk(start, followlinks=True, onerror=_refused):
        status = os.stat(parent)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        if parent != start and is_run(parent, files):
            folders.clear()
            continue
        # Links last: labels lie beside the folder itself rather than beside a link to it.
        folders[:] = (name for name in folders if not is_hidden(name))
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))  # noqa: PTH114, PTH118
        for name in sorted(files):
            if wanted(name):
                yield os.path.join(parent, name)  # noqa: PTH118


def holds_pictures(folder: str | Path) -> bool:
    """Tell whether `walk` finds any; most often by the first file, without listing all."""
    with suppress(OSError), os.scandir(folder) as entries:
        if any(is_picture(entry.name) for entry in entries):
            return True
    return any(walk(Path(folder)))


def holds_runs(folder: Path) -> bool:
    """Tell whether a folder is the one that runs go to, with nothing else in it."""
    return folder.name == RUNS and not holds_pictures(folder)


def _refused(error: OSError) -> None:
    reason = f"{error.filename}: cannot be listed ({error.strerror})"
    raise DataError(f"{reason}; let it be read, or move it away") from error
