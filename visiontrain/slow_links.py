"""Modes over a slow link that the kernel makes: a step's measured time beside the predicted one.

What is predicted from: a step of one device, measured by both ends at once, in turn with steps of
the mode; and the link, measured by transfers between the two ends (`strategies/probe.py`). How the
link was shaped is not asked.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from visiontrain import app
from visiontrain.core.own import Objects, objects_of
from visiontrain.core.types import Place
from visiontrain.data.loader import Step
from visiontrain.engine.learner import Learner
from visiontrain.measuring import facts_of, timed_step, work_of
from visiontrain.recipe import Run
from visiontrain.staging import cheapest
from visiontrain.strategies import speeds
from visiontrain.strategies.config import DDP, FSDP, Group, Pipeline, Single
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.forecast import Facts
from visiontrain.strategies.links import Link, Network
from visiontrain.strategies.member import share_of
from visiontrain.strategies.shaped import Host, ended, linked
from visiontrain.strategies.speeds import EVERY, Speed, Work
from visiontrain.strategies.staged import staged_of

END = "visiontrain.link_end"  # sits above this module and is only named here
PROBE = "visiontrain.strategies.probe"
PORT = 29_500
ENDS = 2
NEVER = 10**9
FEDERATED = "federated"
MODES: Mapping[str, Group] = {
    "ddp": DDP(),
    "powersgd": DDP(compress="powersgd", compress_after=0.0),
    f"sync_every={EVERY}": DDP(sync_every=EVERY),
    "fsdp": FSDP(),
    "pipeline": Pipeline(),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """How steps are timed: some are left out first, then means over `per` steps are noted."""

    first: int
    values: int
    per: int = 1


# Modes that seldom talk are timed over whole periods; ddp makes its buckets anew after a step.
TIMINGS = {
    "ddp": Timing(2, 5),
    "powersgd": Timing(2, 8, 4),
    f"sync_every={EVERY}": Timing(EVERY, 5, EVERY),
    "fsdp": Timing(1, 5),
    "pipeline": Timing(1, 8, 2),
    FEDERATED: Timing(1, 3),
}
LEAST = 3  # steps alone, after each value


@dataclass(frozen=True, slots=True)
class Row:
    """A mode over a link."""

    mode: str
    link: Link  # as measured
    alone: Sequence[float]  # seconds of a step of one device, in turn with those of the mode
    seconds: Sequence[float]  # of a step, each the mean of one or more
    sent: float  # bytes per step that were counted
    predicted: Speed

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        measured, predicted = statistics.median(self.seconds), self.predicted.seconds
        return {
            "mode": self.mode,
            "measured_s": measured,
            "predicted_s": predicted,
            "off": predicted / measured - 1,
            "alone_s": statistics.median(self.alone),
            "seconds": list(self.seconds),
            "alone": list(self.alone),
            "bytes": self.sent,
            "predicted_bytes": self.predicted.sent,
            "latency_s": self.link.latency,
            "bytes_per_s": self.link.bandwidth,
        }


def measure(
    run: Run, rate: str, modes: Sequence[str], timings: Mapping[str, Timing] = TIMINGS
) -> Iterator[dict[str, Any]]:
    """Train some steps in each mode over a link of a rate; yield rows, as `Row.as_json`.

    Args:
        run: what to train; its batch is that of both ends together.
        rate: of the link, as `tc` writes it: 10mbit.
        modes: names in MODES, or FEDERATED.
        timings: of each mode.

    Raises:
        NotMeasuredError: this machine, or this user, cannot have such a link.
        VisiontrainError: an end failed.
    """
    with linked(rate) as (first, second):
        link = measured_link(first, second)
        run = run.model_copy(update={"strategy": Single()})
        listed = [[name, asdict(timings[name])] for name in modes if name != FEDERATED]
        job = {"run": run.model_dump_json(), "link": asdict(link), "modes": listed}
        lines = _ranks(first, second, job)
        work = next(lines)
        yield from lines
        if FEDERATED in modes:
            with tempfile.TemporaryDirectory(prefix="visiontrain-") as folder:
                text = federated_run(run, Path(folder)).model_dump_json()
                more = {"run": text, "work": work, "timing": asdict(timings[FEDERATED])}
                yield _rounds(first, second, job | more)


def measured_link(first: Host, second: Host) -> Link:
    """Measure transfers from one end to the other and back."""
    processes = {
        "the first end": first.start(PROBE, ["serve", first.address]),
        "the second end": second.start(PROBE, ["ask", first.address]),
    }
    found = json.loads(ended(processes)["the second end"])
    return Link("measured", found["latency"], found["bandwidth"])


def federated_run(run: Run, folder: Path) -> Run:
    """Return the same training on clients, each of EVERY steps of half a batch in a round."""
    config = Federated(clients=ENDS, rounds=1000)
    images = ENDS * EVERY * (run.batch // ENDS)
    data = run.data.model_copy(update={"train_images": images})
    own = {"strategy": config, "batch": run.batch // ENDS, "data": data, "out": str(folder)}
    return run.model_copy(update=own | {"epochs": config.rounds})


def _ranks(first: Host, second: Host, job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Run both ends of one group; yield what the first writes, as it does."""
    told = {"WORLD_SIZE": str(ENDS), "MASTER_ADDR": first.address, "MASTER_PORT": str(PORT)}
    told |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}
    processes = {
        f"rank {rank}": host.start(END, ["rank", json.dumps(job)], RANK=str(rank), **told)
        for rank, host in enumerate((first, second))
    }
    yield from map(json.loads, processes["rank 0"].stdout or ())
    ended(processes)


def _rounds(first: Host, second: Host, job: Mapping[str, Any]) -> dict[str, Any]:
    """Run a federated server on one end, its clients on the other; return the server's row."""
    words = [json.dumps({**job, "address": first.address})]
    one = {"OMP_NUM_THREADS": "1"}
    processes = {"the server": first.start(END, ["server", *words], **one)}
    for number in range(ENDS):
        client = second.start(END, ["client", *words, str(number)], **one)
        processes[f"client {number}"] = client
    return json.loads(ended(processes)["the server"])


# -- in the ends ------------------------------------------------------------------------

Trained = tuple[Learner, Iterator[Step]]


def timed(job_json: str, place: Place, objects: Objects) -> int:
    """Be one rank: measure a step alone, then modes; the first prints what it found."""
    job = json.loads(job_json)
    run, network = Run.model_validate_json(job["run"]), Network(Link(**job["link"]))
    facts = facts_of(run)
    work = work_of(run, facts, run.batch // ENDS)
    alone = built(run, DDP(sync_every=NEVER), place, objects)
    tell = partial(print, flush=True) if place.is_main else str  # to the parent
    tell(json.dumps(asdict(work)))
    for name, timing in job["modes"]:
        mode = built(run, resolved(MODES[name], facts), place, objects)
        took, without, sent = in_turn(mode, alone, Timing(**timing))
        known = predicted(name, facts, work.at(statistics.median(without)), network)
        tell(json.dumps(Row(name, network.between, without, took, sent, known).as_json()))
    return 0


def built(run: Run, config: Group, place: Place, objects: Objects) -> Trained:
    """Make what trains in a mode."""
    config = config.model_copy(update={"processes": place.world})
    run = run.model_copy(update={"strategy": config})
    place = replace(place, shard=share_of(config, place.rank, place.world))
    return app.build_traced(run.model_dump_json(), place, objects or objects_of(run))


def resolved(config: Group, facts: Facts) -> Group:
    """Name a pipeline's stages, which were measured."""
    if not isinstance(config, Pipeline):
        return config
    first = cheapest(facts.costs, ENDS) or [0]
    return config.model_copy(update={"stages": [facts.costs[n].name for n in first[1:]]})


def in_turn(
    mode: Trained, alone: Trained, timing: Timing
) -> tuple[list[float], list[float], float]:
    """Time steps of a mode, and of the same without the link, in turn: the machine may be busy.

    Returns:
        seconds of a mode's step; of one alone; and the bytes per step that the mode counted.
    """
    mean_of(mode, timing.first)
    mean_of(alone, 1)
    before, took, without = mode[0].strategy.bytes_sent, [], []
    for _ in range(timing.values):
        took.append(mean_of(mode, timing.per))
        without.append(mean_of(alone, max(timing.per, LEAST)))
    sent = mode[0].strategy.bytes_sent - before
    return took, without, sent / (timing.values * timing.per)


def mean_of(trained: Trained, count: int) -> float:
    """Train steps; return their mean seconds."""
    return sum(timed_step(*trained) for _ in range(count)) / count


def predicted(name: str, facts: Facts, work: Work, network: Network) -> Speed:
    """Predict a mode on both ends."""
    if name == "pipeline":
        first = cheapest(facts.costs, ENDS) or [0]
        staged = staged_of(facts, work, network, ENDS, Pipeline(), first)
        return speeds.pipeline(work, network, ENDS, staged)
    if name == "powersgd":
        return speeds.powersgd(work, network, ENDS)
    if name.startswith("sync_every"):
        return speeds.local_sgd(work, network, ENDS, EVERY)
    if name == "fsdp":
        return speeds.fsdp(work, network, ENDS, gloo=True)
    return speeds.ddp(work, network, ENDS)
