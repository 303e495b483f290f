"""The ways to be consistent, played through with workers of any speed; no engine, no tensors."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from visiontrain.strategies.parameter_server.ledger import RULES, Ledger, Slot, Unit


@dataclass
class Play:
    """Workers that take as long as they like, in a time of their own."""

    ledger: Ledger
    speed: dict[str, float]  # mean seconds of a unit
    random: random.Random
    now: float = 0.0
    events: list = field(default_factory=list)
    asked: dict = field(default_factory=dict)  # worker -> what it waits to be allowed
    done: Counter = field(default_factory=Counter)
    ahead: int = 0  # most units that a running worker was ahead of the slowest
    unread: int = 0  # gradients that somebody who must not see them could have read
    pushes: list = field(default_factory=list)  # (clock, place) in the order they came
    held: dict = field(default_factory=dict)  # (clock, place) -> units whose gradient came there
    loading: int = 0  # units that a worker claims ahead, as its loader does
    claimed: dict = field(default_factory=dict)  # worker -> units it has, and whether more come

    def join(self, name):
        self.ledger.join(name)
        self.asked[name] = ("claim", None)

    def claim(self, name):
        """Return the unit to begin; a loader claims others behind it, and keeps their order."""
        units, more = self.claimed.get(name, ([], True))
        more = more or not units
        while more and len(units) <= self.loading:
            unit = self.ledger.claim(name)
            units, more = [*units, *([] if unit is None else [unit])], unit is not None
        self.claimed[name] = units[1:], more
        return units[0] if units else None

    def leave(self, name):
        self.ledger.leave(name)
        self.asked.pop(name, None)
        self.events = [event for event in self.events if event[1] != name]
        heapq.heapify(self.events)

    def later(self, name, what, unit, slot=None):
        if what == "reads":
            wait = self.random.random() * 0.01
        else:
            wait = self.random.expovariate(1 / self.speed[name])
        heapq.heappush(self.events, (self.now + wait, name, what, unit, slot))

    def settle(self):
        """Let every worker that waits try again, until nobody gets any further."""
        moved = True
        while moved:
            moved = False
            for name in list(self.asked):
                moved = self.try_again(name) or moved

    def try_again(self, name):
        what, unit = self.asked[name]
        ledger = self.ledger
        if what == "claim":
            unit = self.claim(name)
            if unit is None:
                return False
            self.asked[name] = ("start", unit)
        elif what == "start":
            if not ledger.start(name, unit, self.now):
                return False
            least = min(member.done for member in ledger.members.values())
            self.ahead = max(self.ahead, ledger.members[name].done - least)
            del self.asked[name]
            self.later(name, "reads", unit)
        else:
            slot = ledger.slot(name, unit)
            if slot is True:
                return False
            if slot is False:
                self.asked[name] = ("claim", None)
            else:
                self.look(name)
                self.pushes.append((slot.clock, slot.place))
                self.held.setdefault((slot.clock, slot.place), set()).add(unit)
                del self.asked[name]
                self.later(name, "pushed", unit, slot)
        return True

    def look(self, name):
        """Count who has still to read weights of a clock that must not know this gradient."""
        ledger, staleness = self.ledger, getattr(self.ledger.rule, "staleness", None)
        if staleness is None:
            return
        clock = ledger.members[name].done
        for other in ledger.members.values():
            reads = not other.has_read and other.running is not None
            self.unread += reads and clock >= other.done + staleness

    def run(self, until=None):
        """Play until everything is done, or for some events."""
        self.settle()
        count = 0
        while self.events and (until is None or count < until):
            count += 1
            self.now, name, what, unit, slot = heapq.heappop(self.events)
            if what == "reads":
                self.ledger.read(name)
                self.later(name, "made", unit)
            elif what == "made":
                self.asked[name] = ("slot", unit)
            else:
                self.ledger.done(name, unit, slot)
                self.done[unit] += 1
                self.asked[name] = ("claim", None)
            self.settle()
        return self


def play(kind, workers, steps, *, seed=0, staleness=2, shares=None, speeds=None, loading=0):
    shares = shares or workers
    made = Play(
        Ledger(RULES[kind](staleness), shares),
        dict(zip([f"w{n}" for n in range(workers)], speeds or [1.0] * workers, strict=True)),
        random.Random(seed),
        loading=loading,
    )
    for name in made.speed:
        made.join(name)
    made.ledger.open(range(steps))
    return made


speeds_of = st.lists(st.floats(0.01, 10), min_size=1, max_size=5)


@given(st.sampled_from(sorted(RULES)), speeds_of, st.integers(0, 2**32), st.integers(0, 4))
def test_every_unit_is_done_once_whatever_the_speeds(kind, speeds, seed, staleness):
    shares = max(1, len(speeds) - 1) if kind == "backup" else len(speeds)
    made = play(
        kind, len(speeds), 6, seed=seed, staleness=staleness, shares=shares, speeds=speeds
    ).run()

    assert made.ledger.is_over
    assert made.done == {Unit(step, share): 1 for step in range(6) for share in range(shares)}
    alone = kind in ("asp", "ssp", "easgd")
    assert made.ledger.updates == (6 * shares if alone else 6)


@given(speeds_of, st.integers(0, 2**32), st.integers(0, 4))
def test_ssp_lets_nobody_be_more_than_s_ahead_nor_see_what_is_too_new(speeds, seed, staleness):
    made = play("ssp", len(speeds), 8, seed=seed, staleness=staleness, speeds=speeds).run()

    assert made.ahead <= staleness
    assert made.unread == 0


def test_ssp_lets_workers_be_s_ahead():
    # Else the test above would hold for a rule that lets nobody start.
    made = play("ssp", 3, 30, staleness=3, speeds=[0.01, 1.0, 1.0]).run()

    assert made.ahead == 3


@given(st.sampled_from(sorted(RULES)), st.integers(0, 2**32), st.data())
def test_workers_that_die_and_others_that_come_lose_nothing(kind, seed, data):
    shares = 2 if kind == "backup" else 3
    made = play(kind, 3, 6, seed=seed, shares=shares, loading=data.draw(st.integers(0, 2)))
    names = [f"w{n}" for n in range(3)]
    for fault in range(3):
        made.run(until=data.draw(st.integers(0, 12)))
        dead = data.draw(st.sampled_from(sorted(made.ledger.members)))
        made.leave(dead)
        made.run(until=data.draw(st.integers(0, 12)))  # a process takes seconds to start
        names.append(f"new{fault}")
        made.speed[names[-1]] = data.draw(st.floats(0.01, 10))
        made.join(names[-1])
    made.run()

    assert made.ledger.is_over
    assert made.done == {Unit(step, share): 1 for step in range(6) for share in range(shares)}
    # Servers keep the first gradient that comes to a place: another unit's would be for nothing.
    assert {len(units) for units in made.held.values()} == {1}


def test_loaders_that_claim_ahead_leave_each_worker_a_share_of_every_step():
    none, two = (play("bsp", 2, 50, loading=loading, speeds=[1e-9] * 2) for loading in (0, 2))
    for made in (none, two):
        made.later = partial(in_a_second, made)
        made.run()
    assert two.ledger.is_over
    assert two.now == pytest.approx(none.now)  # not one share after the other


def in_a_second(made, name, what, unit, slot=None):
    wait = 1.0 if what == "made" else 0.0
    heapq.heappush(made.events, (made.now + wait, name, what, unit, slot))


def test_bsp_never_mixes_steps():
    made = play("bsp", 3, 10, seed=3, speeds=[0.1, 1.0, 3.0]).run()

    clocks = [clock for clock, _ in made.pushes]
    assert clocks == sorted(clocks)
    assert Counter(clocks) == dict.fromkeys(range(10), 3)


def test_backup_waits_for_all_but_the_slowest_and_hands_its_images_out_again():
    fast = play("backup", 3, 40, shares=2, speeds=[1.0, 1.0, 40.0]).run()
    all_of_them = play("bsp", 3, 40, shares=2, speeds=[1.0, 1.0, 40.0]).run()

    assert fast.ledger.dropped > 0
    assert fast.now < 0.5 * all_of_them.now
    assert set(fast.done.values()) == {1}


def test_a_closed_segment_ends_with_the_steps_that_were_begun():
    made = play("asp", 3, 100, seed=1)
    made.run(until=50)
    begun = {unit.step for member in made.ledger.members.values() for unit in member.claimed}
    assert made.ledger.close() == max(begun)
    made.run()

    assert made.ledger.is_over
    steps = {unit.step for unit in made.done}
    assert steps == set(range(max(begun) + 1))
    assert set(made.done.values()) == {1}


def test_after_a_rewind_what_was_under_way_is_for_nothing():
    made = play("bsp", 2, 4)
    made.run(until=9)
    era, before = made.ledger.era, dict(made.done)
    made.events.clear()
    made.asked = dict.fromkeys(made.ledger.members, ("claim", None))
    made.done.clear()
    made.ledger.stop()
    made.ledger.updates = 1
    made.ledger.open([1, 2, 3])
    made.run()

    assert before
    assert made.ledger.era == era + 1
    assert set(made.done) == {Unit(step, share) for step in (1, 2, 3) for share in range(2)}
    assert made.ledger.updates == 4


def test_a_place_of_a_worker_that_died_is_kept_for_its_unit():
    """Servers may have the gradient: another's in its place would be lost, and this one twice."""
    ledger = Ledger(RULES["backup"](0), 2)
    for name in ("a", "b", "c"):
        ledger.join(name)
    ledger.open([0, 1])
    units = {name: ledger.claim(name) for name in ("a", "b", "c")}
    for name, unit in units.items():
        assert ledger.start(name, unit)
    assert ledger.slot("b", units["b"]) == Slot(0, 0, 2)
    assert ledger.slot("a", units["a"]) == Slot(0, 1, 2)
    ledger.leave("a")
    assert ledger.slot("c", units["c"]) is False
    ledger.join("a")
    again = [ledger.claim("a"), ledger.claim("a")]
    assert again == [units["a"], units["c"]]
    assert ledger.start("a", units["a"])
    assert ledger.slot("a", units["a"]) == Slot(0, 1, 2)
    assert not ledger.start("a", units["c"])  # that is for the next update
    for name in ("a", "b"):
        ledger.done(name, units[name], Slot(0, 0, 2))
    assert ledger.updates == 1
    assert ledger.start("a", units["c"])


def test_who_hangs_is_named():
    ledger = Ledger(RULES["asp"](0), 2)
    for name in ("a", "b"):
        ledger.join(name)
    ledger.open([0])
    for at, name in enumerate(("a", "b")):
        unit = ledger.claim(name)
        assert unit is not None
        ledger.start(name, unit, now=10.0 * at)
    assert ledger.overdue(now=16.0, seconds=15.0) == ["a"]
    assert ledger.overdue(now=26.0, seconds=15.0) == ["a", "b"]
    assert ledger.overdue(now=14.0, seconds=15.0) == []


@pytest.mark.parametrize("kind", sorted(RULES))
def test_one_worker_alone_goes_through_everything_in_order(kind):
    made = play(kind, 1, 5).run()

    assert list(made.done) == [Unit(step, 0) for step in range(5)]
    assert made.ledger.updates == 5


@given(st.sampled_from(sorted(RULES)), st.integers(0, 2**32), st.data())
def test_what_is_abandoned_is_handed_out_again(kind, seed, data):
    made = play(kind, 3, 6, seed=seed, shares=2 if kind == "backup" else 3)
    for _ in range(3):
        made.run(until=data.draw(st.integers(0, 12)))
        pending = [unit for units in made.ledger._pending.values() for unit in units]
        made.ledger.abandon()
        made.done.subtract(pending)
        made.events.clear()
        made.asked = dict.fromkeys(made.ledger.members, ("claim", None))
    made.run()

    assert made.ledger.is_over
    assert set((+made.done).values()) == {1}
    assert len(+made.done) == 6 * made.ledger.shares
    assert {len(units) for units in made.held.values()} == {1}
