"""The plan verb: what a training would need in each mode, before any of them runs."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from visiontrain import app
from visiontrain.core.config import build, merge
from visiontrain.core.errors import ConfigError, RankError
from visiontrain.core.memory import forget_peak, peak_rss_mb, resident
from visiontrain.core.own import Objects, objects_of
from visiontrain.core.types import Batch, Place
from visiontrain.engine.autobatch import free_memory
from visiontrain.engine.learner import Learner
from visiontrain.engine.step import train_step
from visiontrain.plan_config import OWN, PlanConfig
from visiontrain.prepare import below
from visiontrain.recipe import Run, check_values, foreign
from visiontrain.staging import IMAGES, within
from visiontrain.strategies import forecast, launch
from visiontrain.strategies.config import (
    DDP,
    FSDP,
    Group,
    Pipeline,
    Single,
    StrategyConfig,
    check_pipeline,
)
from visiontrain.strategies.cuts import starts
from visiontrain.strategies.devices import devices, settle
from visiontrain.strategies.forecast import Facts, Forecast
from visiontrain.strategies.live import LiveBytes
from visiontrain.strategies.precision import resolve
from visiontrain.strategies.profile import measure
from visiontrain.strategies.stage import PER_PROCESS

WORKER = "visiontrain.worker"  # sits above this module and is only named here
STEPS = 4  # that are weighed: the first two make what stays
GIB, MIB = 2**30, 2**20
COLUMNS = ("weights", "gradients", "optimizer", "average", "activations", "tensors", "resident")


@dataclass(frozen=True, slots=True)
class Weighed:
    """What one process of a mode held at most, bytes."""

    tensors: int
    resident: int


@dataclass(frozen=True, slots=True)
class Mode:
    """What a mode would need, and needed."""

    known: Forecast
    weighed: Sequence[Weighed] = ()  # of each process, where it was asked for


@dataclass(frozen=True, slots=True)
class Plan:
    """What each mode would need."""

    title: str
    devices: int
    memory: float  # bytes that one process may hold
    modes: Sequence[Mode]
    left_out: Sequence[str]  # modes that cannot be, and why

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return the table for people."""
        head = "".join(f"{name:>12}" for name in COLUMNS)
        notes = [
            f"{mode.known.mode}: stages begin at {', '.join(mode.known.stages)}"
            for mode in self.modes
            if mode.known.stages
        ]
        return [
            f"{self.title}: MiB at most in each process of {self.devices}, which may hold "
            f"{self.memory / MIB:.0f}",
            f"{'':22}{head}{'sends/step':>12}{'waits':>7}  fits",
            *(row for mode in self.modes for row in self._rows(mode)),
            *notes,
            *self.left_out,
        ]

    def _rows(self, mode: Mode) -> list[str]:
        known, rows = mode.known, []
        for number, need in enumerate(known.needs):
            name = known.mode if not number else ""
            name = f"{name:18}#{number:<3}" if len(known.needs) > 1 else f"{name:22}"
            sizes = "".join(f"{getattr(need, column) / MIB:12.0f}" for column in COLUMNS)
            last = f"{known.sent / MIB:12.1f}{known.bubble:7.0%}" if not number else f"{'':19}"
            rows.append(f"{name}{sizes}{last}  {'yes' if need.resident <= self.memory else 'no'}")
        for number, held in enumerate(mode.weighed):
            sizes = f"{held.tensors / MIB:12.0f}{held.resident / MIB:12.0f}"
            rows.append(f"{f'  measured #{number}':22}{'':60}{sizes}")
        return rows

    def as_json(self) -> dict[str, Any]:
        """Return all of it, in bytes."""
        rows = [
            asdict(mode.known)
            | {
                "needs": [{c: getattr(need, c) for c in COLUMNS} for need in mode.known.needs],
                "weighed": [asdict(held) for held in mode.weighed],
                "fits": mode.known.fits(self.memory),
            }
            for mode in self.modes
        ]
        return {"devices": self.devices, "memory": self.memory, "modes": rows}


def plan(config: PlanConfig) -> Plan:
    """Measure the model on a few images here, and work out what each mode needs.

    Raises:
        VisiontrainError: the training cannot be.
    """
    given = config.strategy.processes if isinstance(config.strategy, Group) else 2
    count, run = config.devices or given, _settled(config)
    facts = facts_of(run)
    found: list[tuple[StrategyConfig, Forecast]] = [(Single(), forecast.single(facts))]
    left_out = []
    if count > 1:
        found.append((DDP(processes=count), forecast.ddp(facts, count)))
        found.append((FSDP(processes=count), forecast.fsdp(facts, count)))
        try:
            found.append(_staged(run, facts, count))
        except ConfigError as error:
            left_out.append(f"pipeline: {error}")
    device = devices(run.device)[0]
    memory = config.memory * GIB if config.memory else free_memory(device, count)
    parts = f" in {run.accumulate} parts" if run.accumulate > 1 else ""
    precision = resolve(run.precision, device)
    modes = [Mode(known, weigh_mode(run, mode) if config.measure else ()) for mode, known in found]
    return Plan(
        f"{run.model.kind}, {run.imgsz} px, batch {run.batch}{parts}, {precision}",
        count,
        memory,
        modes,
        left_out,
    )


def _settled(config: PlanConfig) -> Run:
    given = config.model_dump(exclude_unset=True, exclude=set(OWN))
    run = build(Run, merge(Run, below(given), given))
    if run.batch < 0:
        raise ConfigError(f"batch: {run.batch}; what fits differs from mode to mode, take a number")
    check_values(run)
    return run


def _staged(run: Run, facts: Facts, count: int) -> tuple[Pipeline, Forecast]:
    config = run.strategy if isinstance(run.strategy, Pipeline) else Pipeline()
    check_pipeline(config, count, run.accumulate)
    stages = PER_PROCESS[config.schedule] * (count // config.data_parallel)
    names = [cost.name for cost in facts.costs]
    if len(names) < stages:
        raise ConfigError(f"{stages} stages; the model has {len(names)} blocks")
    chosen = config.stages
    if chosen == "auto":
        here = run.model_copy(update={"strategy": config.model_copy(update={"processes": count})})
        micro = max(run.accumulate, count // config.data_parallel)
        scale = -(-run.batch // (micro * config.data_parallel)) / facts.images
        first = within(here, facts.costs, micro, scale)
    else:
        first = starts(names, chosen, stages)
    known = forecast.pipeline(facts, count, config.schedule, first, config.data_parallel)
    config = config.model_copy(update={"processes": count, "stages": list(known.stages)})
    return config, known


def facts_of(run: Run) -> Facts:
    """Measure the blocks of a run's model, and its loss, on a few images in this process."""
    if foreign(run):
        raise ConfigError(
            f"model: {run.model.kind} is one block, of which nothing is known; take another"
        )
    images = max(2, min(IMAGES, -(-run.batch // run.accumulate)))
    alone = {"strategy": Single(), "batch": images, "accumulate": 1, "recompute": False}
    small = run.model_copy(update=alone)
    place = Place(devices(run.device)[0], 0, 1)
    learner, steps = app.build_traced(small.model_dump_json(), place, objects_of(run))
    loaded = next(iter(steps)).micro_batches[0]
    held = [tensor for named in learner.tensors().values() for tensor in named.values()]
    base = resident() - sum(tensor.nbytes for tensor in held)  # the data, kept in memory or not
    batch = loaded.to(place.device, learner.strategy.precision.images)
    with learner.strategy.precision.autocast(place.device):
        costs = measure(learner.model, batch.images)
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    trained = sum(cost.trained for cost in costs)
    return Facts(
        costs=costs,
        images=images,
        loss=loss_bytes(learner, batch),
        image=(loaded.images.nbytes + batch.images.nbytes) // images,
        states=sum(value.nbytes for value in states) / max(1, trained),
        average=run.ema,
        recompute=run.recompute,
        batch=run.batch,
        accumulate=run.accumulate,
        base=base,
    )


def loss_bytes(learner: Learner, batch: Batch) -> int:
    """Return the bytes at most in tensors that the loss makes of a batch's outputs."""
    with learner.strategy.precision.autocast(batch.images.device):
        outputs = learner.model(batch.images)
    with LiveBytes() as live:
        learner.task.loss(outputs, batch, 0.0)
    return live.peak


# -- measured -------------------------------------------------------------------------


def weigh_mode(run: Run, mode: StrategyConfig) -> list[Weighed]:
    """Train a few steps in a mode on this machine; return what its processes held.

    Raises:
        VisiontrainError: it cannot run here.
    """
    mode = settle(mode, run.device)
    run = run.model_copy(update={"strategy": mode})
    entry = importlib.import_module(WORKER).weighed
    with tempfile.TemporaryDirectory(prefix="visiontrain-") as folder:
        job = json.dumps({"run": run.model_dump(mode="json"), "folder": folder})
        code = launch.run(mode, run.device, entry, job, objects_of(run))
        if code:
            raise RankError(f"plan: {mode.kind} ended with exit code {code} before its time")
        texts = [path.read_text() for path in sorted(Path(folder).iterdir())]
    return [Weighed(**json.loads(text)) for text in texts]


def weigh(job_json: str, place: Place, objects: Objects) -> int:
    """Be one process of `weigh_mode`: train, and write down what was held at most."""
    job = json.loads(job_json)
    learner, steps = app.build_traced(json.dumps(job["run"]), place, objects)
    with LiveBytes() as live:
        for named in learner.tensors().values():
            live.add(named.values())
        for number, step in enumerate(islice(steps, STEPS)):
            if number == STEPS // 2:
                live.restart()
                forget_peak()
            for batch in step.micro_batches:
                live.add(getattr(batch, name) for name in Batch.__slots__)
            train_step(learner, step.micro_batches, step.images)
        held = Weighed(live.peak, round(peak_rss_mb() * MIB))
    Path(job["folder"], f"{place.rank:05}").write_text(json.dumps(asdict(held)))
    return 0
