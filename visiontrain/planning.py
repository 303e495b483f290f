"""The plan verb: what a training would need in each mode, before any of them runs."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from visiontrain import app
from visiontrain.core.config import build, merge
from visiontrain.core.errors import ConfigError, RankError, VisiontrainError
from visiontrain.core.memory import forget_peak, peak_rss_mb
from visiontrain.core.own import Objects, objects_of
from visiontrain.core.types import Batch, Place
from visiontrain.data.config import sides
from visiontrain.engine.autobatch import free_memory
from visiontrain.engine.step import train_step
from visiontrain.extrapolation import extrapolate, scale_of
from visiontrain.measuring import facts_of, used
from visiontrain.plan_config import OWN, PlanConfig
from visiontrain.prepare import below, check_group
from visiontrain.recipe import Run
from visiontrain.report.extrapolated import Extrapolation
from visiontrain.run_checks import check_values
from visiontrain.staging import refuse_larger, within
from visiontrain.strategies import forecast, launch
from visiontrain.strategies.config import (
    DDP,
    FSDP,
    Group,
    Pipeline,
    Single,
    StrategyConfig,
)
from visiontrain.strategies.cuts import starts
from visiontrain.strategies.devices import devices, let_go, settle
from visiontrain.strategies.environment import launched
from visiontrain.strategies.forecast import Facts, Forecast
from visiontrain.strategies.live import LiveBytes
from visiontrain.strategies.precision import resolve
from visiontrain.strategies.stage import PER_PROCESS

WORKER = "visiontrain.worker"  # sits above this module and is only named here
STEPS = 4  # that are weighed: the first two make what stays
GIB, MIB = 2**30, 2**20
# Keys of modes that are counted with, or that change nothing of what is counted.
KNOWN = {
    *("kind", "processes", "schedule", "stages", "memory", "data_parallel", "sharded"),
    *("threads", "timeout_s", "max_restarts"),
}
COLUMNS = ("weights", "gradients", "optimizer", "average", "activations", "tensors", "resident")


@dataclass(frozen=True, slots=True)
class Weighed:
    """What one process of a mode held at most, bytes."""

    tensors: int
    resident: int
    sent: int  # bytes, by the main process, in the last step


@dataclass(frozen=True, slots=True)
class Mode:
    """What a mode would need, and needed."""

    known: Forecast
    memory: float  # bytes that one process may hold
    weighed: Sequence[Weighed] = ()  # of each process, where it was asked for


@dataclass(frozen=True, slots=True)
class Plan:
    """What each mode would need."""

    title: str
    devices: int
    memory: float | None  # GiB that each device has, as it was given
    modes: Sequence[Mode]
    left_out: Sequence[str]  # modes that cannot be, and why
    speeds: Extrapolation | None = None  # on more devices, where links were given

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
        room = f"{self.memory:g} GiB each" if self.memory else "this machine's memory, shared"
        return [
            f"{self.title}, {self.devices} devices, {room}; MiB at most in each process:",
            f"{'':22}{head}{'sends/step':>12}{'waits':>7}  fits",
            *(row for mode in self.modes for row in self._rows(mode)),
            *notes,
            *self.left_out,
            *(self.speeds.lines() if self.speeds else ()),
        ]

    def _rows(self, mode: Mode) -> list[str]:
        known, rows = mode.known, []
        for number, need in enumerate(known.needs):
            name = known.mode if not number else ""
            name = f"{name:18}#{number:<3}" if len(known.needs) > 1 else f"{name:22}"
            sizes = "".join(f"{getattr(need, column) / MIB:12.0f}" for column in COLUMNS)
            last = f"{known.sent / MIB:12.1f}{known.bubble:7.0%}" if not number else f"{'':19}"
            rows.append(f"{name}{sizes}{last}  {'yes' if need.resident <= mode.memory else 'no'}")
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
                "memory": mode.memory,
                "fits": mode.known.fits(mode.memory),
            }
            for mode in self.modes
        ]
        return {
            "title": self.title,
            "devices": self.devices,
            "modes": rows,
            "left_out": list(self.left_out),
            "predicted": self.speeds.as_json() if self.speeds else None,
        }


def plan(config: PlanConfig) -> Plan:
    """Measure the model on a few images here, and work out what each mode needs.

    Raises:
        VisiontrainError: the training cannot be.
    """
    if launched() is not None:
        raise ConfigError("plan: under a launcher; start it without, it starts its own processes")
    count, asked = _count(config), _settled(config)
    run = at_largest(asked)
    scale = scale_of(config)
    facts = facts_of(run)
    device = devices(run.device)[0]
    # Speeds are predicted of the pipeline that is counted here, if there is one.
    staged = run.model_copy(update={"strategy": Single()})
    modes, left_out = [], []
    for mode in modes_of(run, count):
        here = run.model_copy(update={"strategy": mode})
        processes = mode.processes if isinstance(mode, Group) else 1
        memory = config.memory * GIB if config.memory else _room(device, processes)
        try:
            check_values(here)
            check_group(here)
            known, mode_here = foretold(here, facts)
            if isinstance(mode_here, Pipeline):
                staged = run.model_copy(update={"strategy": mode_here})
        except VisiontrainError as error:
            left_out.append(f"{mode.kind}: {error}")
            continue
        weighed: Sequence[Weighed] = ()
        try:
            weighed = weigh_mode(run, mode_here) if config.measure else ()
        except VisiontrainError as error:
            left_out.append(f"{mode.kind}, not measured: {error}")
        modes.append(Mode(known, memory, weighed))
    parts = f" in {run.accumulate} parts" if run.accumulate > 1 else ""
    precision = resolve(run.precision, device)
    most = " (the largest)" if run.imgsz != asked.imgsz else ""
    title = f"{run.model.kind}, {run.imgsz} px{most}, batch {run.batch}{parts}, {precision}"
    found = None
    if scale is not None:
        scale = replace(scale, gloo=device.type == "cpu" and config.step_s is None)
        found = extrapolate(staged, count, scale, facts, config.step_s)
    return Plan(title, count, config.memory, modes, left_out, found)


def _count(config: PlanConfig) -> int:
    """Return how many devices there are to be; each has a process."""
    if not isinstance(config.strategy, Group):
        return config.devices or 2
    said, devices = config.strategy.processes, config.devices or config.strategy.processes
    if said != devices and "processes" in config.strategy.model_fields_set:
        raise ConfigError(
            f"devices: {devices}, but strategy.processes is {said}; each device has one process, "
            "leave one of the two out"
        )
    return devices


def modes_of(run: Run, count: int) -> list[StrategyConfig]:
    """Return the modes that are compared: the user's own as it is, the others as they come.

    Raises:
        ConfigError: the user's own takes more devices.
    """
    if count == 1:
        if isinstance(run.strategy, Group):
            raise ConfigError(
                f"strategy: {run.strategy.kind} on one device, where nobody shares; take devices=2 "
                "or leave it out"
            )
        return [Single()]
    groups: list[StrategyConfig] = [DDP(), FSDP(), Pipeline()]
    own = [run.strategy if group.kind == run.strategy.kind else group for group in groups]
    return [Single(), *(mode.model_copy(update={"processes": count}) for mode in own)]


def foretold(run: Run, facts: Facts) -> tuple[Forecast, StrategyConfig]:
    """Return what a run's mode needs, and the mode with the stages that were chosen."""
    mode = run.strategy
    if isinstance(mode, DDP):
        return forecast.ddp(facts, mode.processes), mode
    if isinstance(mode, FSDP):
        return forecast.fsdp(facts, mode.processes), mode
    if isinstance(mode, Pipeline):
        return _staged(mode, facts)
    return forecast.single(facts), mode


def _room(device: torch.device, processes: int) -> float:
    """Return the bytes that each process may hold; of a GPU all: what is used counts as held."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return free_memory(device, processes)


def _settled(config: PlanConfig) -> Run:
    given = config.model_dump(exclude_unset=True, exclude=set(OWN))
    run = build(Run, merge(Run, below(given), given))
    if run.batch < 0:
        raise ConfigError(f"batch: {run.batch}; what fits differs from mode to mode, take a number")
    check_values(run)
    if not isinstance(run.strategy, Single | DDP | FSDP | Pipeline):
        raise ConfigError(
            f"strategy: {run.strategy.kind}; plan counts with one device per process, "
            "take single, ddp, fsdp or pipeline"
        )
    fields = type(run.strategy).model_fields
    # A run's config.yaml holds all keys, most of them as they are anyway.
    changed = {key for key, field in fields.items() if getattr(run.strategy, key) != field.default}
    unknown = changed - KNOWN
    if unknown:
        raise ConfigError(
            f"strategy.{min(unknown)}: plan does not know what it changes; leave it out"
        )
    return run


def at_largest(run: Run) -> Run:
    """Return a run whose sides vary with all steps at the largest, which memory has to hold."""
    largest = max(sides(run.imgsz, run.augment))
    if largest == run.imgsz:
        return run
    fixed = run.augment.model_copy(update={"multi_scale": 0.0})
    return run.model_copy(update={"imgsz": largest, "augment": fixed})


def _staged(config: Pipeline, facts: Facts) -> tuple[Forecast, Pipeline]:
    count, copies = config.processes, config.data_parallel
    depth, names = count // copies, [cost.name for cost in facts.costs]
    stages = PER_PROCESS[config.schedule] * depth
    if len(names) < stages:
        raise ConfigError(f"{stages} stages; the model has {len(names)} blocks")
    chosen = config.stages
    if chosen == "auto":
        first = within(config, facts, depth)
    else:
        first = starts(names, chosen, stages)
        refuse_larger(config, facts, depth, first)
    known = forecast.pipeline(facts, count, config.schedule, first, copies, sharded=config.sharded)
    return known, config.model_copy(update={"stages": list(known.stages)})


# -- measured -------------------------------------------------------------------------


def weigh_mode(run: Run, mode: StrategyConfig) -> list[Weighed]:
    """Train a few steps in a mode on this machine; return what its processes held.

    Raises:
        VisiontrainError: it cannot run here.
    """
    device = run.device if isinstance(mode, Group) else run.device.split(",")[0]
    mode = settle(mode, device)
    let_go()
    run = run.model_copy(update={"strategy": mode, "device": device})
    entry = importlib.import_module(WORKER).weighed
    with tempfile.TemporaryDirectory(prefix="visiontrain-") as folder:
        job = json.dumps({"run": run.model_dump(mode="json"), "folder": folder})
        code = launch.run(mode, device, entry, job, objects_of(run))
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
        sent = 0
        for number, step in enumerate(islice(steps, STEPS)):
            if number == STEPS // 2:
                live.restart()
                forget_peak()
                if place.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(place.device)
            before = learner.strategy.bytes_sent
            for batch in step.micro_batches:
                live.add(getattr(batch, name) for name in Batch.__slots__)
            train_step(learner, step.micro_batches, step.images)
            sent = learner.strategy.bytes_sent - before
    held = round(peak_rss_mb() * MIB)
    if place.device.type == "cuda":  # beside the allocator's most, what it never gets
        reserved, most = torch.cuda.memory_reserved, torch.cuda.max_memory_reserved
        held = used(place.device) - reserved(place.device) + most(place.device)
    weighed = Weighed(live.peak, held, round(sent))
    Path(job["folder"], f"{place.rank:05}").write_text(json.dumps(asdict(weighed)))
    return 0
