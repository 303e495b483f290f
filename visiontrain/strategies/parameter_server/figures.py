"""What a run with parameter servers counts: staleness, updates, bytes, waiting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """What a worker tells of a unit that is done."""

    terms: Numbers  # sums of the loss
    counts: Numbers  # by head
    images: int
    norm: float | None = None  # of the gradient of an update that this one completed
    staleness: int | None = None  # updates between reading and applying, likewise
    pushed: int = 0  # bytes
    pulled: int = 0  # bytes
    waited: float = 0.0  # seconds, for other workers
    worked: float = 0.0  # seconds, from the reading of weights on
    exchanged: float = 0.0  # of these, reading weights and pushing
    peak: float = 0.0  # MB of memory
    rows: Sequence[Sequence[float]] = ()  # fingerprints of the images, where they are asked for


@dataclass(slots=True)
class Totals:
    """Reports, put together."""

    staleness: Counter[int] = field(default_factory=Counter)  # how many updates had which
    units: Counter[str] = field(default_factory=Counter)  # gradients by worker
    waited: dict[str, float] = field(default_factory=dict)  # seconds by worker
    worked: dict[str, float] = field(default_factory=dict)
    exchanged: dict[str, float] = field(default_factory=dict)
    pushed: int = 0  # bytes
    pulled: int = 0
    dropped: int = 0  # gradients that came too late for their update
    restarts: int = 0  # of workers and servers
    lost: int = 0  # updates that a server had not saved when it died
    seconds: float = 0.0  # that others trained
    peak: float = 0.0  # MB of memory, the most of any worker
    rows: list[Sequence[float]] = field(default_factory=list)

    def add(self, name: str, report: Report) -> None:
        """Count a unit."""
        if report.staleness is not None:
            self.staleness[report.staleness] += 1
        self.units[name] += 1
        _add(self.waited, {name: report.waited})
        _add(self.worked, {name: report.worked})
        _add(self.exchanged, {name: report.exchanged})
        self.pushed += report.pushed
        self.pulled += report.pulled
        self.peak = max(self.peak, report.peak)
        self.rows += report.rows

    def join(self, other: Totals) -> None:
        """Add what happened at another time."""
        self.staleness.update(other.staleness)
        self.units.update(other.units)
        _add(self.waited, other.waited)
        _add(self.worked, other.worked)
        _add(self.exchanged, other.exchanged)
        for name in ("pushed", "pulled", "dropped", "restarts", "lost", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.peak = max(self.peak, other.peak)
        self.rows += other.rows

    @property
    def updates(self) -> int:
        """Return how many updates there were."""
        return sum(self.staleness.values())

    @property
    def wait(self) -> float:
        """Return the share of their time that workers waited for each other."""
        return self._share(self.waited)

    @property
    def exchange(self) -> float:
        """Return the share of their time that workers read weights and pushed gradients."""
        return self._share(self.exchanged)

    def _share(self, seconds: Mapping[str, float]) -> float:
        whole = sum(self.waited.values()) + sum(self.worked.values())
        return sum(seconds.values()) / whole if whole else 0.0

    def numbers(self) -> dict[str, float]:
        """Return columns of results.csv."""
        updates = self.updates
        return {
            "updates_per_s": updates / self.seconds if self.seconds else 0.0,
            "staleness": sum(k * n for k, n in self.staleness.items()) / updates if updates else 0,
            "wait": self.wait,
            "exchange": self.exchange,
            "bytes_pushed": self.pushed,
            "bytes_pulled": self.pulled,
            "dropped": self.dropped,
        }

    def summary(self) -> dict[str, Any]:
        """Return what metrics.json says, from which `of` makes it again."""
        return self.numbers() | {
            "updates": self.updates,
            "stalenesses": {str(k): n for k, n in sorted(self.staleness.items())},
            "gradients": dict(sorted(self.units.items())),
            "waited_s": dict(sorted(self.waited.items())),
            "worked_s": dict(sorted(self.worked.items())),
            "exchanged_s": dict(sorted(self.exchanged.items())),
            "trained_s": self.seconds,
            "restarts": self.restarts,
            "lost_updates": self.lost,
        }

    @classmethod
    def of(cls, summary: Mapping[str, Any]) -> Totals:
        """Read what `summary` returned; nothing, if it is another mode's."""
        if "stalenesses" not in summary:
            return cls()
        return cls(
            staleness=Counter({int(k): n for k, n in summary["stalenesses"].items()}),
            units=Counter(summary["gradients"]),
            waited=dict(summary["waited_s"]),
            worked=dict(summary["worked_s"]),
            exchanged=dict(summary["exchanged_s"]),
            pushed=summary["bytes_pushed"],
            pulled=summary["bytes_pulled"],
            dropped=summary["dropped"],
            restarts=summary["restarts"],
            lost=summary["lost_updates"],
            seconds=summary["trained_s"],
        )


def _add(mine: dict[str, float], theirs: Mapping[str, float]) -> None:
    for name, value in theirs.items():
        mine[name] = mine.get(name, 0.0) + value
