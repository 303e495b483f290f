"""Which worker computes which share of which step, and who waits for whom; knows no engine.

A step's batch is cut into shares; a unit is one share of one step. Workers take units in order,
whoever is free the next one, so none is computed for nothing, and one that a worker takes to its
grave is handed out again. What differs between the ways to be consistent is when a worker may
start a unit, and which updates its gradient becomes a part of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol


class Unit(NamedTuple):
    """A share of a step."""

    step: int
    share: int


class Slot(NamedTuple):
    """A gradient's place in an update, which waits for all of its places."""

    clock: int  # number of the update, unique
    place: int
    places: int


@dataclass(slots=True)
class Member:
    """A worker, as the ledger sees it."""

    claimed: list[Unit] = field(default_factory=list)  # and not done
    running: Unit | None = None
    since: float = 0.0  # when it last got any further
    waits: bool = False  # for others: nobody may say that it hangs
    done: int = 0  # units since all last met: its clock
    has_read: bool = False  # the weights, for the unit it runs
    update: int = 0  # how many updates there were when it started


class Rule(Protocol):
    """A way to be consistent."""

    def may_start(self, ledger: Ledger, name: str, unit: Unit) -> bool:
        """Tell whether a worker may read the weights for a unit of its."""
        ...

    def slot(self, ledger: Ledger, name: str, unit: Unit) -> Slot | bool:
        """Return where a finished gradient goes; True to wait, False to drop it."""
        ...

    def may_follow(self, ledger: Ledger, unit: Unit, held: Sequence[Unit]) -> bool:
        """Tell whether a worker may claim a unit behind those it has: it keeps that order."""
        ...


class Ledger:
    """Hands out the units of one segment of a run after the other, and keeps the books."""

    def __init__(self, rule: Rule, shares: int) -> None:
        """Begin with nothing to do.

        Args:
            rule: how workers are kept together.
            shares: of a step, and gradients of an update where it has several.
        """
        self.rule, self.shares = rule, shares
        self.members: dict[str, Member] = {}
        self.updates = 0  # that are complete
        self.dropped = 0  # gradients that came too late for their update
        # Which has which place in the next update: also when its worker died, since servers may
        # have its gradient. Whoever computes it again sends the same one to the same place.
        self.accepted: dict[Unit, int] = {}
        self.era = 0  # one more at each rewind: what is older is for nothing
        self._queue: deque[Unit] = deque()
        self._open: dict[int, int] = {}  # step: units that are not done
        self._pending: dict[int, list[Unit]] = {}  # clock of an update: what is in it already

    # -- the driver ---------------------------------------------------------------

    def open(self, steps: Iterable[int]) -> None:
        """Add steps; all workers meet where there is nothing more to do."""
        for step in steps:
            self._queue.extend(Unit(step, share) for share in range(self.shares))
            self._open[step] = self.shares
        if not any(member.claimed for member in self.members.values()):
            for member in self.members.values():
                member.done = 0

    def close(self) -> int:
        """Take back what nobody has begun, but for the rest of steps that somebody has.

        Returns:
            the last step that is or will be done; -1 if there is none.
        """
        idle: list[Unit] = []
        for member in self.members.values():
            idle += [unit for unit in member.claimed if unit != member.running]
            member.claimed = [] if member.running is None else [member.running]
        self._return(idle)
        begun = {m.running.step for m in self.members.values() if m.running is not None}
        begun |= {step for step, left in self._open.items() if left < self.shares}
        begun |= {unit.step for unit in self.accepted}  # nobody else can fill their places
        last = max(begun, default=-1)
        self._queue = deque(unit for unit in self._queue if unit.step <= last)
        self._open = {step: left for step, left in self._open.items() if step <= last}
        return last

    def stop(self) -> None:
        """Forget all units, as servers go back to an earlier update."""
        self.abandon()
        self._queue.clear()
        self._open, self.accepted = {}, {}
        for member in self.members.values():
            member.done = 0

    def abandon(self) -> list[Unit]:
        """Let gradients under way be for nothing, and those of updates that are not complete.

        A server that died had some of them. Their units are handed out again.

        Returns:
            the units that were done, and are no more.
        """
        self.era += 1
        undone = [unit for pending in self._pending.values() for unit in pending]
        for unit in undone:
            self._open[unit.step] = self._open.get(unit.step, 0) + 1
        units = list(undone)
        for member in self.members.values():
            units += member.claimed
            member.claimed, member.running, member.has_read = [], None, False
        self._return(units)
        self._pending = {}
        return undone

    @property
    def is_over(self) -> bool:
        """Whether every unit is done."""
        return not self._open

    @property
    def has_more(self) -> bool:
        """Whether there are units that nobody has claimed."""
        return bool(self._queue)

    @property
    def step(self) -> int:
        """The lowest step that is not done."""
        return min(self._open)

    # -- workers ------------------------------------------------------------------

    def join(self, name: str, now: float = 0.0) -> None:
        """Take in a worker; it is where the slowest is."""
        least = min((member.done for member in self.members.values()), default=0)
        self.members[name] = Member(done=least, since=now)

    def leave(self, name: str) -> None:
        """Hand out again what a worker had not done."""
        member = self.members.pop(name, None)
        if member is not None:
            self._return(member.claimed)

    def claim(self, name: str) -> Unit | None:
        """Give a worker the next unit; None when there is none for it, till it did what it has."""
        held = self.members[name].claimed
        free = (u for u in self._queue if not held or self.rule.may_follow(self, u, held))
        unit = next(free, None)
        if unit is not None:
            self._queue.remove(unit)
            held.append(unit)
        return unit

    def start(self, name: str, unit: Unit, now: float = 0.0) -> bool:
        """Let a worker begin a unit it claimed, unless it has to wait."""
        member = self.members[name]
        if unit not in member.claimed or not self.rule.may_start(self, name, unit):
            return False
        member.running, member.since, member.has_read = unit, now, False
        member.update = self.updates
        return True

    def read(self, name: str) -> None:
        """Note that a worker has read the weights."""
        self.members[name].has_read = True

    def slot(self, name: str, unit: Unit) -> Slot | bool:
        """Return where a worker's gradient goes; True to wait; False when it came too late.

        What came too late is handed out again: the gradient is lost, its images are not.
        """
        found = self.rule.slot(self, name, unit)
        if found is False:
            self.dropped += 1
            member = self.members[name]
            member.claimed.remove(unit)
            member.running = None
            self._return([unit])
        return found

    def done(self, name: str, unit: Unit, slot: Slot) -> None:
        """Note that a worker's gradient is in its place on every server."""
        member = self.members[name]
        member.claimed.remove(unit)
        member.running, member.has_read = None, False
        member.done += 1
        self._open[unit.step] -= 1
        if not self._open[unit.step]:
            del self._open[unit.step]
        if not slot.places:  # nothing went to servers, so that it is no update
            return
        filled = self._pending.setdefault(slot.clock, [])
        filled.append(unit)
        if len(filled) == slot.places:
            del self._pending[slot.clock]
            self.updates += 1
            self.accepted = {}

    def overdue(self, now: float, seconds: float) -> list[str]:
        """Name workers that got no further for too long, though they have or could have work."""
        return [
            name
            for name, member in self.members.items()
            if (member.claimed or self.has_more)
            and not member.waits
            and now - member.since > seconds
        ]

    def _return(self, units: list[Unit]) -> None:
        """Put units back, those first that an update waits for, which keeps their places."""
        every = [*units, *self._queue]
        self._queue = deque(sorted(every, key=lambda unit: (unit not in self.accepted, unit)))


@dataclass(frozen=True, slots=True)
class Synchronous:
    """`bsp`: an update is the sum over all shares of a step, as on one device."""

    def may_start(self, ledger: Ledger, name: str, unit: Unit) -> bool:
        """Wait for all earlier steps."""
        del name
        return unit.step == ledger.step

    def slot(self, ledger: Ledger, name: str, unit: Unit) -> Slot | bool:
        """Each share has its place, whoever computed it."""
        del name
        return Slot(unit.step, unit.share, ledger.shares)

    def may_follow(self, ledger: Ledger, unit: Unit, held: Sequence[Unit]) -> bool:
        """Leave the other shares of a step to others, and those that died: all wait for them."""
        del ledger
        return unit.step > max(held).step


@dataclass(frozen=True, slots=True)
class Asynchronous:
    """`asp`: each gradient is an update; nobody waits (Dean et al. 2012)."""

    def may_start(self, ledger: Ledger, name: str, unit: Unit) -> bool:
        """Never wait."""
        del ledger, name, unit
        return True

    def slot(self, ledger: Ledger, name: str, unit: Unit) -> Slot | bool:
        """Each gradient is alone."""
        del name
        return Slot(unit.step * ledger.shares + unit.share, 0, 1)

    def may_follow(self, ledger: Ledger, unit: Unit, held: Sequence[Unit]) -> bool:
        """Take any: nobody waits for one."""
        del ledger, unit, held
        return True


@dataclass(frozen=True, slots=True)
class StaleSynchronous:
    """`ssp`: as asp, but nobody gets more than `staleness` units ahead of the slowest.

    Ho et al. 2013: who is at clock c sees all updates of clocks below c - s, and none of clocks
    from c + s on. With s = 0 that is the very gradients of bsp, applied one after the other:
    plain SGD, whose updates add up, comes to the same weights. With momentum it does not, and
    only waits as bsp does: each of the W updates moves the buffer by a factor of its own.
    """

    staleness: int

    def may_start(self, ledger: Ledger, name: str, unit: Unit) -> bool:
        """Wait for the slowest."""
        del unit
        busy = (m for m in ledger.members.values() if m.claimed or ledger.has_more)
        least = min(member.done for member in busy)
        return ledger.members[name].done - least <= self.staleness

    def slot(self, ledger: Ledger, name: str, unit: Unit) -> Slot | bool:
        """Wait for those who must not see this gradient, until they have read the weights."""
        clock = ledger.members[name].done
        for other in ledger.members.values():
            unread = not other.has_read and (bool(other.claimed) or ledger.has_more)
            if clock - other.done >= self.staleness and unread:
                return True
        return Asynchronous().slot(ledger, name, unit)

    def may_follow(self, ledger: Ledger, unit: Unit, held: Sequence[Unit]) -> bool:
        """Take any: workers wait for each other's counts, whatever they count."""
        del ledger, unit, held
        return True


@dataclass(frozen=True, slots=True)
class Backup:
    """`backup`: an update is the sum of the first gradients that come (Chen et al. 2016).

    As many as a step has shares; there are more workers. What comes later is dropped.
    """

    def may_start(self, ledger: Ledger, name: str, unit: Unit) -> bool:
        """Wait for the next update when this one has all; who is fast may be in it twice."""
        del name
        return unit in ledger.accepted or len(ledger.accepted) < ledger.shares

    def slot(self, ledger: Ledger, name: str, unit: Unit) -> Slot | bool:
        """Take the first ones of those that read the newest weights."""
        member = ledger.members[name]
        if unit not in ledger.accepted:
            if member.update < ledger.updates or len(ledger.accepted) == ledger.shares:
                return False
            taken = set(ledger.accepted.values())
            ledger.accepted[unit] = min(set(range(ledger.shares)) - taken)
        return Slot(ledger.updates, ledger.accepted[unit], ledger.shares)

    def may_follow(self, ledger: Ledger, unit: Unit, held: Sequence[Unit]) -> bool:
        """Leave what an update waits for to who can start with it: others wait for that update."""
        del held
        return unit not in ledger.accepted


RULES: dict[str, Callable[[int], Rule]] = {
    "bsp": lambda _: Synchronous(),
    "asp": lambda _: Asynchronous(),
    "ssp": StaleSynchronous,
    "backup": lambda _: Backup(),
    "easgd": lambda _: Asynchronous(),
}
