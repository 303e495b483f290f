"""What a person watches: live bars on a terminal, one line per epoch elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Clock = Callable[[], float]  # seconds

HEARTBEAT_S = 30.0  # without a terminal: a line this often while an epoch lasts
# Title, key in results.csv, width; a column is shown when the first row has its key.
COLUMNS: tuple[tuple[str, str, int], ...] = (
    ("loss", "loss", 8),
    ("mAP50-95", "val/map", 9),
    ("mAP50", "val/map50", 7),
    ("top-1", "val/top1", 7),
    ("lr", "lr", 9),
    ("img/s", "images_per_s", 8),
    ("wait", "data_wait", 6),
    ("time", "seconds", 9),
)


def is_plain(console: Console) -> bool:
    """Say whether bars would be out of place: a pipe, a file, a notebook, or NO_COLOR."""
    return not console.is_terminal or console.no_color or console.is_dumb_terminal


class Silent:
    """Shows nothing: `log.to` without `console`."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Show nothing."""

    def step(self, done: int, terms: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Show nothing."""

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Show nothing."""

    def message(self, text: str) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Do nothing."""


class Pace:
    """Where the run stands, and when it will end at the pace since this process began."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began: tuple[float, float] | None = None  # (seconds, epochs done before)
        self.epoch = self.epochs = self.steps = self.done = 0

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Note that epoch `epoch` (from 1) of `epochs` begins."""
        self.epoch, self.epochs, self.steps, self.done = epoch, epochs, steps, 0

    def step(self, done: int) -> None:
        """Note how many steps of the epoch are over; a resumed epoch begins in its middle."""
        self.done = done
        if self._began is None:
            self._began = (self._clock(), self._position())

    def eta(self) -> float | None:
        """Return the seconds left, None before anything was measured."""
        if self._began is None:
            return None
        seconds, position = self._clock() - self._began[0], self._position()
        covered = position - self._began[1]
        return seconds / covered * (self.epochs - position) if covered > 0 else None

    def _position(self) -> float:
        return self.epoch - 1 + self.done / max(self.steps, 1)


class EpochTable:
    """Turns the rows of results.csv into aligned lines under one header."""

    def __init__(self) -> None:
        self._columns: list[tuple[str, str, int]] = []

    def lines(self, row: Mapping[str, float], epochs: int) -> list[str]:
        """Return the line of `row`, after the header when it is the first or has new columns."""
        values = {**row, **_total(row)}
        columns = [column for column in COLUMNS if column[1] in values or column in self._columns]
        lines = []
        if columns != self._columns:
            self._columns = columns
            lines.append(
                f"{'epoch':>9}" + "".join(f" {_title(c, values):>{c[2]}}" for c in columns)
            )
        cells = (f" {_cell(key, values.get(key)):>{width}}" for _, key, width in columns)
        place = f"{int(row['epoch'])}/{epochs}"
        return [*lines, f"{place:>9}" + "".join(cells)]


class PlainProgress:
    """Lines that read well in a file: one per epoch, and a heartbeat in long epochs."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._pace = Pace(clock)
        self._table = EpochTable()
        self._spoke = clock()

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Note the epoch; nothing is printed."""
        self._pace.start_epoch(epoch, epochs, steps)

    def step(self, done: int, terms: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Print where the run stands when nothing was printed for a minute."""
        self._pace.step(done)
        if self._clock() - self._spoke >= HEARTBEAT_S:
            place = f"epoch {self._pace.epoch}/{self._pace.epochs} step {done}/{self._pace.steps}"
            self.message(f"{place}  {_state(terms, numbers)}  ETA {_clock_text(self._pace.eta())}")

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Print the epoch's line."""
        for line in self._table.lines(row, self._pace.epochs):
            self.message(line)

    def message(self, text: str) -> None:
        """Print one line."""
        self._spoke = self._clock()
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Do nothing: lines need no cleaning up."""


class ConsoleProgress:
    """Bars at the foot of the terminal; the lines of past epochs scroll above."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        self._console = console
        self._pace = Pace(clock)
        self._lines = PlainProgress(console, clock)
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Show an empty bar."""
        self._pace.start_epoch(epoch, epochs, steps)
        self._lines.start_epoch(epoch, epochs, steps)
        self._live.start()
        self._draw({}, {})

    def step(self, done: int, terms: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Move the bar; show losses, rate, speed, waiting and the time left."""
        self._pace.step(done)
        self._draw(terms, numbers)

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Print the epoch's line above the bar."""
        self._lines.end_epoch(row)

    def message(self, text: str) -> None:
        """Print one line above the bar."""
        self._lines.message(text)

    def close(self) -> None:
        """Take the bar away and show the cursor again."""
        self._live.stop()

    def _draw(self, terms: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        pace = self._pace
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(f"epoch {pace.epoch}/{pace.epochs}", style="bold"),
            ProgressBar(total=max(pace.steps, 1), completed=pace.done, width=24),
            f"{pace.done}/{pace.steps}",
            f"ETA {_clock_text(pace.eta())}",
        )
        # Lines of their own, cut rather than wrapped: 80 columns hold no more.
        speed = Text(_state({}, numbers), style="cyan", overflow="ellipsis", no_wrap=True)
        losses = Text(_state(terms, {}), style="dim", overflow="ellipsis", no_wrap=True)
        self._live.update(Group(line, speed, losses), refresh=True)


def _total(row: Mapping[str, float]) -> dict[str, float]:
    terms = [value for key, value in row.items() if key.startswith("train/")]
    return {"loss": math.fsum(terms)} if terms else {}


def _title(column: tuple[str, str, int], values: Mapping[str, float]) -> str:
    """Return a column's title: of classes of whole images, mAP is of no overlaps."""
    title, key, _ = column
    return "mAP" if key == "val/map" and "val/map50" not in values else title


def _cell(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if key == "data_wait":
        return f"{value:.0%}"
    if key == "seconds":
        return _clock_text(value)
    if key == "images_per_s":
        return f"{value:.1f}"
    return f"{value:.2e}" if key == "lr" else f"{value:.4f}"


def _state(terms: Mapping[str, float], numbers: Mapping[str, float]) -> str:
    """Join losses and numbers into one line, in the order given."""
    names = {"lr": "lr", "images_per_s": "img/s", "data_wait": "wait"}
    parts = [f"{name} {value:.3f}" for name, value in terms.items()]
    parts += [f"{names.get(key, key)} {_cell(key, value)}" for key, value in numbers.items()]
    return "  ".join(parts)


def _clock_text(seconds: float | None) -> str:
    """Write seconds as 0:07, 12:34 or 1:02:03."""
    if seconds is None or not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
