"""Where workers, servers and the driver of a run meet: the ledger, behind calls that wait.

The calls are coroutines of one event loop and know no engine: Ray's actors run them, tests run
them in threads.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from visiontrain.strategies.parameter_server.figures import Report, Totals
from visiontrain.strategies.parameter_server.ledger import Ledger, Rule, Slot, Unit


class Hub:
    """One of these for each run; whoever calls it may be anywhere."""

    def __init__(self, rule: Rule, shares: int, servers: int) -> None:
        self.ledger = Ledger(rule, shares)
        self._servers: dict[int, tuple[int, Any]] = {}  # how many there were, the last one's handle
        self._count = servers
        self._changed = asyncio.Condition()
        self._samples = 0  # of units that are done
        self._reports: list[tuple[Unit, Report]] = []  # of those that make up no step yet
        self._results: dict[int, dict[str, Any]] = {}
        self._next = 0  # number of the next result
        self._norms: dict[int, dict[int, float]] = {}  # clock: squared norms by server
        self._totals = Totals()
        self._steps: list[int] = []  # of the segment
        self._end: int | None = None  # how many of them there will be, once it is cut short
        self._is_open = False  # else results and updates say nothing
        self._ready = False  # whether a worker asked for work
        self._over = False

    async def _until(self, true: Callable[[], bool]) -> None:
        """Wait, but not beyond the end of the run: then what is waited for may never come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._over or true())

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    # -- the driver's -------------------------------------------------------------

    async def open(self, steps: Sequence[int], samples: int) -> None:
        """Hand out these steps; `samples` were seen before them."""
        self._steps, self._end, self._results = list(steps), None, {}
        await self._begin(0, samples)

    async def _begin(self, done: int, samples: int) -> None:
        self._norms.clear()
        self._reports, self._next, self._samples = [], done, samples
        self.ledger.open(self._steps[done : self._end])
        self._is_open = True
        await self._tell()

    async def ready(self) -> None:
        """Wait for a worker that can begin: until then nobody trains."""
        await self._until(lambda: self._ready)

    async def result(self, number: int) -> dict[str, Any]:
        """Wait for the result of the segment's step `number`.

        The sums of the loss over as many units as a step has: those of the step itself, where
        workers wait for each other. Nothing when the run ended first.
        """
        await self._until(lambda: number in self._results)
        return self._results.pop(number, {})

    async def finished(self) -> int:
        """Wait until every unit is done; return how many updates there were."""
        await self._until(lambda: self.ledger.is_over and self._is_open)
        return self.ledger.updates

    def updates(self) -> int:
        """Return how many updates there were."""
        return self.ledger.updates

    async def close(self) -> int:
        """Hand out no more than the rest of steps that are begun; wait for them.

        Returns:
            how many steps of the segment are done then.
        """
        last = self.ledger.close()
        self._end = max(self._next, sum(step <= last for step in self._steps))
        await self._tell()
        await self.finished()
        return self._end

    async def rewind(self, done: int, samples: int, updates: int) -> None:
        """Go back to an earlier update: `done` steps of the segment were before it."""
        self.ledger.updates = updates
        await self._begin(done, samples)

    async def abandon(self) -> int:
        """Let gradients under way be for nothing; return the new era's number."""
        self._norms.clear()
        undone = self.ledger.abandon()
        self._samples -= sum(report.images for unit, report in self._reports if unit in undone)
        self._reports = [(u, report) for u, report in self._reports if u not in undone]
        await self._tell()
        return self.ledger.era

    async def stop_era(self) -> int:
        """Let everything that is under way be for nothing; return the new era's number."""
        self._is_open = False
        self.ledger.stop()
        await self._tell()
        return self.ledger.era

    async def end(self) -> None:
        """Send the workers home, and answer whoever waits."""
        self._over = True
        await self._tell()

    async def live(self) -> None:
        """Wait for the end of the run: who waits for this learns when the process ends before."""
        await self._until(lambda: False)

    def overdue(self, seconds: float) -> list[str]:
        """Name workers that have been at one unit for longer."""
        return self.ledger.overdue(time.monotonic(), seconds)

    def take_totals(self) -> Totals:
        """Return what happened since the last call."""
        totals, self._totals = self._totals, Totals()
        totals.dropped, self.ledger.dropped = self.ledger.dropped, 0
        return totals

    async def put_server(self, number: int, handle: Any) -> None:
        """Tell where a server is now."""
        life, old = self._servers.get(number, (0, None))
        if old != handle:
            self._servers[number] = (life + 1, handle)
            await self._tell()

    # -- workers' -----------------------------------------------------------------

    async def join(self, name: str) -> None:
        """Take in a worker, or take it in again."""
        self.ledger.leave(name)
        self.ledger.join(name, time.monotonic())
        await self._tell()

    @contextmanager
    def _waiting(self, name: str) -> Iterator[None]:
        """Note that a worker waits for others, and does not hang."""
        member = self.ledger.members.get(name)
        if member is None:
            yield
            return
        member.waits = True
        try:
            yield
        finally:
            member.waits, member.since = False, time.monotonic()

    async def server(self, number: int, known: int) -> tuple[int, Any] | None:
        """Wait for a server that came after the `known`-th one; return which, and its handle.

        None when the run is over.
        """
        await self._until(lambda: self._servers.get(number, (0, None))[0] > known)
        return None if self._over else self._servers[number]

    async def segment(self, name: str) -> int | None:
        """Wait for work; return the era; None when there will be no more."""
        self._ready = True
        await self._tell()
        with self._waiting(name):
            await self._until(lambda: self._over or self.ledger.has_more)
        return None if self._over else self.ledger.era

    def claim(self, name: str, era: int) -> Unit | None:
        """Give out the next unit, if there is one in this era."""
        is_wanted = era == self.ledger.era and not self._over
        return self.ledger.claim(name) if is_wanted else None

    async def start(self, name: str, unit: Unit, era: int) -> int | None:
        """Wait until the worker may read the weights; return the samples seen by then.

        None when the unit is no longer this worker's.
        """
        unit = Unit(*unit)

        def may() -> bool:
            return self._is_lost(name, unit, era) or self.ledger.start(name, unit, time.monotonic())

        with self._waiting(name):
            await self._until(may)
        # Of whole steps: how far others have come with this one is chance.
        parts = sum(report.images for _, report in self._reports)
        return None if self._is_lost(name, unit, era) else self._samples - parts

    async def read(self, name: str, era: int) -> None:
        """Note that a worker has the weights."""
        if era == self.ledger.era and name in self.ledger.members:
            self.ledger.read(name)
            await self._tell()

    async def slot(self, name: str, unit: Unit, era: int) -> Slot | None:
        """Wait until a worker may push; None where nobody wants its gradient any more."""
        unit, found = Unit(*unit), None

        def decided() -> bool:
            nonlocal found
            found = None
            if not self._is_lost(name, unit, era):
                found = self.ledger.slot(name, unit)
            return found is not True

        with self._waiting(name):
            await self._until(decided)
        if isinstance(found, Slot):
            return found
        await self._tell()
        return None

    async def done(self, name: str, unit: Unit, slot: Slot, era: int, report: Report) -> None:
        """Note what came of a unit."""
        unit = Unit(*unit)
        if self._is_lost(name, unit, era):
            return
        self._totals.add(name, report)
        self._samples += report.images
        self._reports.append((unit, report))
        if len(self._reports) == self.ledger.shares:
            self._results[self._next] = summed([each for _, each in self._reports])
            self._next += 1
            self._reports = []
        self.ledger.done(name, unit, Slot(*slot))
        await self._tell()

    def _is_lost(self, name: str, unit: Unit, era: int) -> bool:
        member = self.ledger.members.get(name)
        is_past = self._over or era != self.ledger.era
        return is_past or member is None or unit not in member.claimed

    # -- servers' -----------------------------------------------------------------

    async def exchange(self, clock: int, server: int, squared: float, era: int) -> float | None:
        """Return the squared norm of all servers' gradients of an update, once they are known.

        None when the update is not wanted any more.
        """
        if era != self.ledger.era:
            return None
        norms = self._norms.setdefault(clock, {})
        norms[server] = squared
        await self._tell()
        await self._until(lambda: era != self.ledger.era or len(norms) == self._count)
        is_wanted = era == self.ledger.era and len(norms) == self._count
        return sum(norms[n] for n in sorted(norms)) if is_wanted else None


def summed(reports: Sequence[Report]) -> dict[str, Any]:
    """Add up what makes a step."""
    terms, counts = Counter(), Counter()
    for report in reports:
        terms.update(report.terms)
        counts.update(report.counts)
    norms = [report.norm for report in reports if report.norm is not None]
    finite = [norm for norm in norms if math.isfinite(norm)]
    return {
        "terms": dict(terms),
        "counts": dict(counts),
        "norm": max(finite) if finite else math.nan if norms else 0.0,
    }
