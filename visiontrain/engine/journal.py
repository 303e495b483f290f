"""Where a run stands beside its tensors: what progress.json holds, and the running numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[], float]  # seconds


@dataclass(slots=True)
class Journal:
    """The host's side of a run's state; everything in it is JSON."""

    epochs: int = 0  # epochs that are over and scored
    ended: int = 0  # step up to which there is a row: of the last epoch, or of a part of one
    best: float | None = None
    best_epoch: int = 0
    stale: int = 0  # scored epochs since the best one
    skipped: set[int] = field(default_factory=set)  # steps left out since they were not finite
    roll_backs: int = 0
    lr: float = 0.0  # of the last step
    seconds: float = 0.0  # of the sessions before this one
    train_seconds: float = 0.0  # without evaluating and saving
    initial_sha256: str = ""  # of the weights the run began with

    def judge(self, score: float, epoch: int) -> bool:
        """Note a score; tell whether it is the best so far. nan, of no boxes, is the worst.

        While nothing is found yet, what was trained longer is better, and no reason to give up.
        """
        score = -1.0 if math.isnan(score) else score
        improved = self.best is None or score > self.best or score == self.best <= 0
        if improved:
            self.best, self.best_epoch = score, epoch
        # Not counted: after a roll-back an epoch comes again.
        self.stale = epoch - self.best_epoch
        return improved

    def state(self) -> dict[str, Any]:
        """Return what progress.json keeps."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"skipped": sorted(self.skipped)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        for name in state.keys() & set(self.__slots__):  # older runs have no initial_sha256
            setattr(self, name, state[name])
        self.skipped = set(state["skipped"])


class Meter:
    """Means of the loss terms over an epoch, summed on the device: reading is the only sync."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: tuple[str, ...] = ()
        self._before: list[list[float]] = []  # sums and counts at the last `recent`
        self._sums = torch.zeros(2, 0, dtype=torch.float64, device=device)

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Take one step's terms; what is not finite is left out."""
        if terms.keys() != set(self._names):  # at first, and where a run goes on with another loss
            self._start(tuple(terms))
        # Of parameter servers and clients terms come on the CPU, wherever this process computes.
        values = torch.stack([terms[name] for name in self._names]).double().to(self._device)
        finite = torch.isfinite(values)
        self._sums += torch.stack([values.where(finite, 0.0), finite.double()])

    def recent(self) -> dict[str, float]:
        """Return means since the last call. Waits for the device."""
        now = self._sums.tolist()
        sums, counts = (
            [new - old for new, old in zip(*pair, strict=True)]
            for pair in zip(now, self._before, strict=True)
        )
        self._before = now
        return self._means(sums, counts)

    def epoch(self, *, over: bool = True) -> dict[str, float]:
        """Return means over the epoch so far; once it is over start the next. Waits."""
        sums, counts = self._sums.tolist()
        means = self._means(sums, counts)
        if over:
            self._start(self._names)
        return means

    def state(self) -> dict[str, Any]:
        """Return what an epoch that goes on after resume needs."""
        return {"names": list(self._names), "sums": self._sums.tolist()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take what `state` returned."""
        self._start(tuple(state["names"]))
        self._sums += torch.tensor(state["sums"], dtype=torch.float64, device=self._device)
        self._before = self._sums.tolist()

    def _start(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._sums = torch.zeros(2, len(names), dtype=torch.float64, device=self._device)
        self._before = self._sums.tolist()

    def _means(self, sums: list[float], counts: list[float]) -> dict[str, float]:
        return {
            name: total / count if count else float("nan")
            for name, total, count in zip(self._names, sums, counts, strict=True)
        }


@dataclass(slots=True)
class Lap:
    """Time and images of a stretch of training."""

    images: int = 0
    seconds: float = 0.0
    wait: float = 0.0  # of those, waiting for data

    def numbers(self) -> dict[str, float]:
        """Return images per second and the share of time spent waiting for data."""
        seconds = self.seconds or float("inf")
        return {"images_per_s": self.images / seconds, "data_wait": self.wait / seconds}


class Pace:
    """Measures training without evaluating and saving: over an epoch, and since the last look.

    On a GPU steps return before they are done, so a stretch is right where it ends in a sync,
    as the trainer's readings do; `data_wait` is then an upper bound.
    """

    def __init__(self, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._mark = self._got = clock()
        self._epoch, self._recent = Lap(), Lap()

    def begin(self) -> None:
        """Start waiting for a step's data."""
        self._mark = self._clock()

    def fetched(self) -> None:
        """Note that the data is there."""
        self._got = self._clock()

    def leave_out(self, seconds: float) -> None:
        """Leave seconds out of the step under way, in which nobody could train."""
        self._mark += seconds
        self._got += seconds

    def done(self, images: int) -> float:
        """Note that a step of `images` is over; return its seconds."""
        seconds, wait = self._clock() - self._mark, self._got - self._mark
        for lap in (self._epoch, self._recent):
            lap.images += images
            lap.seconds += seconds
            lap.wait += wait
        return seconds

    def recent(self) -> dict[str, float]:
        """Return the numbers since the last call."""
        numbers, self._recent = self._recent.numbers(), Lap()
        return numbers

    def epoch(self) -> dict[str, float]:
        """Return the numbers of the epoch, and start the next one."""
        numbers, self._epoch = self._epoch.numbers(), Lap()
        return numbers
