"""The table of a comparison: what each mode reached, what it cost, how exact it is."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from visiontrain.core.durable import replace_file, storing, to_json
from visiontrain.report.extrapolated import Extrapolation
from visiontrain.report.rows import LOST, SCORES, SPLIT, Row
from visiontrain.report.verdict import verdict

WIDTH = 120  # characters of a line on the terminal
SHORTEST = 16  # characters of a name that one line of the table has room for
LOOSE: Any = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
WORDS = {"within noise": "within", "better": "beyond", "worse": "beyond"}  # of Row.word
LEGEND = (
    "WxT: processes and CPU threads of each; MB/step, MB sent: what the main process sent to "
    "others (parameter servers: what a worker pushed and pulled; federated: a step is a round; "
    "fsdp: as rings, of which gloo sends more); RAM MiB: the most that a process held (not of "
    "servers, nor of federated clients); speedup: in images/s of training; eff.: that for "
    "each core that it may use (on GPUs: for each GPU)"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Modes side by side; as text, the table that the verb prints."""

    folder: Path  # of all runs
    rows: Sequence[Row]  # in the order asked for; those that were stopped are left out
    planned: int  # how many rows there will be
    task: str
    initial_sha256: str  # of the weights that the first run began with
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    exit_code: int  # 0 complete; 1 a row failed; 75 or 130 stopped by a signal
    title: str = ""  # what was trained on what
    budget: str = "samples"  # what all runs got as much of
    predicted: Extrapolation | None = None  # on more devices, where links were given

    def __str__(self) -> str:
        table = [*self._table(), ""] if self.rows else []
        return "\n".join([*table, *self._said(), *self._notes()])

    def verdict(self) -> list[str]:
        """Say in words which mode to take, and why; the first sentence is the answer."""
        return verdict(self.rows, next(iter(SCORES[self.task].values())))

    def samples(self) -> list[int]:
        """Return how many images rows trained on, each number once; clients alone have fewer."""
        rows = [row for row in self.rows if row.strategy["kind"] != "client"]
        return sorted({row.samples for row in rows if row.samples is not None})

    def starts(self) -> dict[int, set[str]]:
        """Return the weights that the runs of each seed began with, by their sha256."""
        found: dict[int, set[str]] = {}
        for trial in (trial for row in self.rows for trial in row.trials):
            if trial.initial_sha256:
                found.setdefault(trial.seed, set()).add(trial.initial_sha256)
        return found

    def origin(self) -> str:
        """Say what the runs began with."""
        starts = self.starts()
        if len(set().union(*starts.values())) < 2:
            return f"of all: sha256 {self.initial_sha256}"
        if any(len(shas) > 1 for shas in starts.values()):
            return "are not the same in all runs: compare.json has each one's"
        each = (f"of seed {seed} {sha[:12]}" for seed, (sha,) in starts.items())
        return f"are the same in all modes, by sha256: {', '.join(each)}"

    def as_json(self) -> dict[str, Any]:
        """Return what compare.json holds."""
        return {
            "task": self.task,
            "title": self.title,
            "budget": self.budget,
            "verdict": self.verdict(),
            "complete": len(self.rows) == self.planned,
            "initial_sha256": self.initial_sha256,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "rows": [_plain(row) for row in self.rows],
            "predicted": self.predicted.as_json() if self.predicted else None,
        }

    def write(self) -> None:
        """Write compare.json, compare.csv and compare.md.

        Raises:
            StorageError: when they cannot be written.
        """
        notes = [
            "",
            *(f"- {text}" for text in self.verdict()),
            "",
            "```",
            *self._notes(),
            "```",
            "",
        ]
        texts = {"csv": self.csv(), "md": "\n".join([self.markdown(), *notes])}
        files = {name: text.encode() for name, text in texts.items()}
        for name, data in ({"json": to_json(self.as_json())} | files).items():
            path = self.folder / f"compare.{name}"
            with storing(path):
                replace_file(path, data)

    # -- the table ----------------------------------------------------------------

    def _cells(self) -> list[list[str]]:
        """Return the head, then a line per row: name first, class last."""
        titles = SCORES[self.task]
        head = ["mode", "WxT", *titles.values(), "diff"]
        head += ["noise"] if self._repeated() else []
        head += ["time s", "img/s", "speedup", "eff."]
        head += ["MB/step", "MB sent", "RAM MiB", "class"]
        return [head, *(self._line(row, titles) for row in self.rows)]

    def _line(self, row: Row, titles: Iterable[str]) -> list[str]:
        share = row.efficiency
        return [
            row.name,
            f"{row.processes}x{row.threads}" if row.processes else "-",
            *(_score(row, name) for name in titles),
            _number(row.difference, "+.3f"),
            *([WORDS.get(row.word or "", "-")] if self._repeated() else []),
            _number(row.seconds, ".1f"),
            _number(row.images_per_s, ".1f"),
            _number(row.speedup, ".2f"),
            "-" if share is None else f"{share:.0%}",
            _megabytes(row.bytes_per_step),
            _megabytes(row.bytes_sent),
            _number(row.peak_rss_mb, ".0f"),
            "failed" if row.error and not row.seeds else row.exactness.removesuffix(" algorithm"),
        ]

    def _repeated(self) -> bool:
        """Tell whether there are several seeds."""
        return any(len(row.trials) > 1 for row in self.rows)

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

    def markdown(self) -> str:
        """Return the table in Markdown."""
        head, *lines = self._cells()
        marks = ["---", *["---:"] * (len(head) - 2), "---"]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, marks, *escaped))

    def csv(self) -> str:
        """Return what compare.csv holds: a line per row, without single runs."""
        text = io.StringIO()
        every = dict.fromkeys(SCORES[self.task], 0.0)  # a row that failed has the same columns
        writer = csv.DictWriter(text, _flattened(Row("", {"kind": ""}, scores=every)))
        writer = csv.DictWriter(text, writer.fieldnames, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            writer.writerow(_flattened(row))
        return text.getvalue()

    # -- below it -----------------------------------------------------------------

    def _said(self) -> list[str]:
        if not self.rows:
            return []
        return [
            *(line for text in self.verdict() for line in textwrap.wrap(text, WIDTH, **LOOSE)),
            "",
        ]

    def _notes(self) -> list[str]:
        """Say what the table has no room for."""
        notes = [note for row in self.rows for note in _notes_of(row)]
        if len(self.samples()) > 1:
            counts = ", ".join(map(str, self.samples()))
            notes.append(f"not all saw as many samples: {counts}")
        machine = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        notes += [*([LEGEND] if self.rows else []), f"{machine}; {versions}"]
        lines = [*self.predicted.lines(), ""] if self.predicted else []
        lines += [line for note in notes for line in textwrap.wrap(note, WIDTH, **LOOSE)]
        lines += textwrap.wrap(f"initial weights {self.origin()}", WIDTH, **LOOSE)
        lines.append(f"results: {self.folder}")
        if len(self.rows) < self.planned:
            folder = shlex.quote(str(self.folder))
            lines.append(f"stopped after {len(self.rows)} of {self.planned}; go on with:")
            lines.append(f"visiontrain compare out={folder} resume=true")  # whole, to be copied
        return lines


def _plain(row: Row) -> dict[str, Any]:
    """Return a row and its runs as JSON values."""
    return row.flat() | {"trials": [asdict(trial) for trial in row.trials]}


def _flattened(row: Row) -> dict[str, Any]:
    """Return a row as a line of CSV."""
    found = row.flat()
    del found["trials"]
    spread = {f"{key}_s": row.split.get(key) for key in SPLIT}
    lost = {key: row.lost.get(key) for key in LOST}
    plain = {
        "strategy": row.strategy["kind"],
        "keys": json.dumps(row.keys, default=str) if row.keys else "",
        "reasons": "; ".join(row.reasons),
        "seeds": " ".join(map(str, row.seeds)),
        "peaks_rss_mb": " ".join(f"{peak:.1f}" for peak in row.peaks_rss_mb),
    }
    return {k: v for k, v in (found | plain).items() if k not in ("split", "lost")} | spread | lost


def _score(row: Row, name: str) -> str:
    """Write a score, the main one with its spread over seeds."""
    value = row.scores.get(name)
    if value is None or math.isnan(value):  # no label decides it
        return "-"
    main = row.spread is not None and name == next(iter(row.scores))
    return f"{value:.3f}±{row.spread:.3f}" if main else f"{value:.3f}"


def _notes_of(row: Row) -> list[str]:
    if row.error:
        return [f"{row.name}: {line}" for line in row.error.splitlines()[:1]]
    if not row.reasons:
        return []
    if row.strategy["kind"] == "client":
        return [f"{row.name}: {reason}" for reason in row.reasons]
    steps = f" over {row.check_steps} steps" if row.check_steps else ""
    return [f"{row.name}: {row.exactness}{steps} ({'; '.join(row.reasons)})"]


def _folded(name: str, width: int) -> list[str]:
    """Cut a name into lines, where the mode or one of its keys ends if that is possible."""
    lines = [""]
    for part in re.split(r"(?<=\+)|(?<=[a-z]{2}-)", name):
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
