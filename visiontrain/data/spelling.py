"""How a label file names its images: as they lie here, or as they lay on another machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import PureWindowsPath

SAMPLE = 20  # names that are looked for first


def spellings(names: list[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield ways to read file names: those to look for, and all of them.

    As they are written comes first; the rest is made only if that finds nothing.
    """
    step = max(1, len(names) // SAMPLE)
    yield names[::step], names
    yield names, names
    whole: list[str] = []
    for some in foreign(names):
        whole = whole or some
        yield some[::step], some
    yield whole, whole


def foreign(names: Sequence[str]) -> Iterator[list[str]]:
    """Read names that another machine wrote: Windows', or below folders that are only there.

    Of absolute ones below all folders that they share, then below all but the last, and so on:
    those of one split may share a folder that is here too.
    """
    plain = [PureWindowsPath(name).as_posix() for name in names]
    if not all(PureWindowsPath(name).root for name in plain):
        yield plain
        return
    bare = [name.lstrip("/") for name in plain]
    shared = os.path.commonpath([os.path.dirname(name) for name in bare])  # noqa: PTH120
    parts = [part for part in shared.split("/") if part]
    for depth in range(len(parts), -1, -1):
        above = "".join(f"{part}/" for part in parts[:depth])
        yield [name.removeprefix(above) for name in bare]
