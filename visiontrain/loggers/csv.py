"""CsvLogger: results.csv, one row per epoch, never torn."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FIRST = ("epoch", "step", "samples", "seconds", "images_per_s", "data_wait", "lr")
LAST = ("bytes_sent",)

_warn = logging.getLogger(__name__).warning


class CsvLogger:
    """Writes results.csv. Resume drops the rows that the checkpoint does not know of.

    The file is rewritten whole, under another name first, so that a reader or a killed run
    never sees half a row, and a column that starts late (val/map) finds its place. So a disk
    that was full for a while costs no row: the next one that can be written brings all.
    """

    name = "csv"

    def __init__(self) -> None:
        self._rows: list[dict[str, str]] = []
        self._step = -1  # of the last row; -1 before the first
        self._behind = False  # the file, since a write failed

    def start(self, config: Mapping[str, Any], out: Path) -> None:  # noqa: ARG002 - interface
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / "results.csv"
        self._rows = [row for row in read_rows(self._path) if int(row["step"]) <= self._step]
        self._write()

    def log(self, row: Mapping[str, float], step: int) -> None:
        new = {key: format_number(value) for key, value in {**row, "step": step}.items()}
        kept = (old for old in self._rows if int(old["step"]) < step)
        # `time` may have cut an epoch that went on later.
        self._rows = [*(old for old in kept if old.get("epoch") != new.get("epoch")), new]
        self._step = step
        self._keep()

    def image(self, name: str, path: Path, step: int) -> None:
        """Ignore pictures: they lie in plots/ already."""

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        kept = [row for row in self._rows if int(row["step"]) <= self._step]
        if len(kept) < len(self._rows):  # rolled back: read meanwhile, and perhaps to stay
            self._rows = kept
            self._keep()

    def close(self, *, exit_code: int = 0) -> None:  # noqa: ARG002 - interface
        """Write what a full disk kept back; else every row was on disk when `log` returned."""
        if self._behind:
            self._write()

    def _keep(self) -> None:
        """Write the rows, or tell once that they are behind."""
        try:
            self._write()
            self._behind = False
        except OSError as error:
            if not self._behind:
                reason = error.strerror or error
                _warn("%s: %s; written when that works again", self._path, reason)
            self._behind = True

    def _write(self) -> None:
        if not self._rows:  # a resumed run that keeps nothing starts anew
            self._path.unlink(missing_ok=True)
            return
        draft = self._path.with_suffix(".csv.part")
        with draft.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns(self._rows), restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self._path)


def columns(rows: list[dict[str, str]]) -> list[str]:
    """Order the union of the rows' keys: fixed ones, train/, val/, the rest, bytes_sent."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    groups = [
        [key for key in FIRST if key in keys],
        [key for key in keys if key.startswith("train/")],
        [key for key in keys if key.startswith("val/")],
    ]
    known = {key for group in groups for key in group}.union(LAST)
    groups.append([key for key in keys if key not in known])
    groups.append([key for key in LAST if key in keys])
    return [key for group in groups for key in group]


def format_number(value: float) -> str:
    """Write whole numbers as such, others with 7 significant digits."""
    return str(value) if isinstance(value, int) else f"{value:.7g}"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read results.csv, or nothing where there is none; rows without a step are left out."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row for row in rows if row.get("step", "").isdigit()]
