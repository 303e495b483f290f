"""The table of a comparison: what each mode reached, what it cost, how exact it is."""

from __future__ import annotations

import csv
import io
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from visiontrain.core.durable import replace_file, storing, to_json

SCORES = {"detect": {"map": "mAP", "map50": "mAP50"}}  # of metrics.json by task; the main one first
WIDTH = 120  # characters of a line on the terminal
SHORTEST = 16  # characters of a name that one line of the table has room for
LOOSE: Any = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
NOT_MEASURED = "not measured"
LEGEND = (
    "WxT: processes and CPU threads of each; MB/step, MB sent: what the main process sent to "
    "others; RAM MB: the most that a process held; speedup: in images/s of training; eff.: that "
    "per process"
)


@dataclass(frozen=True, slots=True)
class Row:
    """What one mode reached. Numbers are None, and scores empty, where there are none."""

    name: str
    strategy: Mapping[str, Any]  # its section of the config, as it ran
    processes: int | None = None
    threads: int | None = None  # of the CPU, in each process
    scores: Mapping[str, float] = field(default_factory=dict)  # on the val split, main one first
    difference: float | None = None  # of the main score, to the first row's
    seconds: float | None = None  # training, scoring and saving; not starting
    steps: int | None = None
    samples: int | None = None
    images_per_s: float | None = None  # training alone
    speedup: float | None = None  # in images/s, over the row of one device
    efficiency: float | None = None  # speedup / processes: T1 / (W * TW)
    bytes_per_step: float | None = None  # that the main process sent to others
    bytes_sent: int | None = None  # likewise, in the whole run
    peak_rss_mb: float | None = None  # of the largest process
    exactness: str = NOT_MEASURED  # control, exact, approximate, different algorithm
    reasons: Sequence[str] = ()  # why not exact, or why not measured
    check_steps: int | None = None  # over which exactness was measured
    error: str | None = None  # why there are no numbers
    initial_sha256: str | None = None  # of the weights it began with
    config_sha256: str | None = None  # of its config.yaml

    def flat(self) -> dict[str, Any]:
        """Return the fields as JSON values, with scores among them under their own names."""
        found: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            found |= dict(value) if name == "scores" else {name: value}
        return found | {"reasons": list(self.reasons)}


def measured(row: Row, metrics: Mapping[str, Any]) -> Row:
    """Fill a row from a run's metrics.json."""
    steps, sent = metrics["steps"], metrics["bytes_sent"]
    return replace(
        row,
        processes=metrics["processes"],
        threads=metrics["threads"],
        scores={name: metrics[name] for name in SCORES[metrics["task"]]},
        seconds=metrics["seconds"],
        steps=steps,
        samples=metrics["samples"],
        images_per_s=metrics["train_images_per_s"],
        bytes_per_step=sent / steps if steps else None,
        bytes_sent=sent,
        peak_rss_mb=metrics["peak_rss_mb"],
        initial_sha256=metrics["initial_sha256"],
        config_sha256=metrics["config_sha256"],
    )


def related(rows: Sequence[Row]) -> list[Row]:
    """Add what only other rows tell: the difference to the first, the speed-up over one device."""
    first = _main_score(rows[0]) if rows else None
    alone = next((row.images_per_s for row in rows if row.strategy["kind"] == "single"), None)
    found = []
    for row in rows:
        score, rate = _main_score(row), row.images_per_s
        speedup = rate / alone if rate and alone else None
        found.append(
            replace(
                row,
                difference=score - first if score is not None and first is not None else None,
                speedup=speedup,
                efficiency=speedup / row.processes if speedup and row.processes else None,
            )
        )
    return found


def _main_score(row: Row) -> float | None:
    return next(iter(row.scores.values()), None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Modes side by side; as text, the table that the verb prints."""

    folder: Path  # of all runs
    rows: Sequence[Row]  # in the order asked for; those that were stopped are left out
    planned: int  # how many rows there will be
    task: str
    initial_sha256: str  # of the weights that every run began with
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    exit_code: int  # 0 complete; 1 a row failed; 75 or 130 stopped by a signal

    def __str__(self) -> str:
        table = [*self._table(), ""] if self.rows else []
        return "\n".join([*table, *self._notes()])

    def as_json(self) -> dict[str, Any]:
        """Return what compare.json holds."""
        return {
            "task": self.task,
            "complete": len(self.rows) == self.planned,
            "initial_sha256": self.initial_sha256,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "rows": [row.flat() for row in self.rows],
        }

    def write(self) -> None:
        """Write compare.json, compare.csv and compare.md.

        Raises:
            StorageError: when they cannot be written.
        """
        notes = ["", "```", *self._notes(), "```", ""]
        texts = {"csv": self._csv(), "md": "\n".join([*self._markdown(), *notes])}
        files = {name: text.encode() for name, text in texts.items()}
        for name, data in ({"json": to_json(self.as_json())} | files).items():
            path = self.folder / f"compare.{name}"
            with storing(path):
                replace_file(path, data)

    # -- the table ----------------------------------------------------------------

    def _cells(self) -> list[list[str]]:
        """Return the head, then a line per row: name first, class last."""
        titles = SCORES[self.task]
        head = ["mode", "WxT", *titles.values(), "diff", "time s", "img/s", "speedup", "eff."]
        head += ["MB/step", "MB sent", "RAM MB", "class"]
        return [head, *(self._line(row, titles) for row in self.rows)]

    def _line(self, row: Row, titles: Iterable[str]) -> list[str]:
        share = row.efficiency
        return [
            row.name,
            f"{row.processes}x{row.threads}" if row.processes else "-",
            *(_number(row.scores.get(name), ".3f") for name in titles),
            _number(row.difference, "+.3f"),
            _number(row.seconds, ".1f"),
            _number(row.images_per_s, ".1f"),
            _number(row.speedup, ".2f"),
            "-" if share is None else f"{share:.0%}",
            _megabytes(row.bytes_per_step),
            _megabytes(row.bytes_sent),
            _number(row.peak_rss_mb, ".0f"),
            "failed" if row.error else row.exactness.removesuffix(" algorithm"),
        ]

    def _table(self) -> list[str]:
        """Align the cells; a long name goes on in the next line."""
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        room = WIDTH - sum(widths[1:]) - 2 * len(widths[1:])
        names = [_folded(name, max(room, SHORTEST)) for name, *_ in cells]
        widths[0] = max(len(part) for parts in names for part in parts)
        lines = []
        for (first, *others), line in zip(names, cells, strict=True):
            middle = [f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)][1:-1]
            lines.append("  ".join([f"{first:<{widths[0]}}", *middle, line[-1]]))
            lines += others
        return lines

    def _markdown(self) -> list[str]:
        head, *lines = self._cells()
        marks = ["---", *["---:"] * (len(head) - 2), "---"]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return [f"| {' | '.join(line)} |" for line in (head, marks, *escaped)]

    def _csv(self) -> str:
        text = io.StringIO()
        every = dict.fromkeys(SCORES[self.task], 0.0)  # a row that failed has the same columns
        writer = csv.DictWriter(text, Row("", {}, scores=every).flat(), lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            plain = {"strategy": row.strategy["kind"], "reasons": "; ".join(row.reasons)}
            writer.writerow(row.flat() | plain)
        return text.getvalue()

    # -- below it -----------------------------------------------------------------

    def _notes(self) -> list[str]:
        """Say what the table has no room for."""
        notes = [note for row in self.rows for note in _notes_of(row)]
        counts = {row.samples for row in self.rows if row.samples is not None}
        if len(counts) > 1:
            notes.append(f"not all saw as many samples: {', '.join(map(str, sorted(counts)))}")
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        notes += [*([LEGEND] if self.rows else []), f"{machine}; {versions}"]
        lines = [line for note in notes for line in textwrap.wrap(note, WIDTH, **LOOSE)]
        lines.append(f"initial weights of all: sha256 {self.initial_sha256}")
        lines.append(f"results: {self.folder}")
        if len(self.rows) < self.planned:
            folder = shlex.quote(str(self.folder))
            lines.append(f"stopped after {len(self.rows)} of {self.planned}; go on with:")
            lines.append(f"visiontrain compare out={folder} resume=true")  # whole, to be copied
        return lines


def _notes_of(row: Row) -> list[str]:
    if row.error:
        return [f"{row.name}: {row.error.splitlines()[0]}"]
    if not row.reasons:
        return []
    steps = f" over {row.check_steps} steps" if row.check_steps else ""
    return [f"{row.name}: {row.exactness}{steps} ({'; '.join(row.reasons)})"]


def _folded(name: str, width: int) -> list[str]:
    """Cut a name into lines, where one of its keys ends if that is possible."""
    lines = [""]
    for part in re.findall(r"[^+]*\+|[^+]+", name):
        if lines[-1] and len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return [line[i : i + width] for line in lines for i in range(0, len(line), width)]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _megabytes(value: float | None) -> str:
    """Write three digits of it, as what is sent spans a factor of a million."""
    if value is None:
        return "-"
    text = f"{value / 1e6:.3g}"
    return f"{value / 1e6:.0f}" if "e" in text else text
