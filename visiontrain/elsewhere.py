"""What servers and workers of a run make of what they are told: their shard, their learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from socket import gethostname

import torch

from visiontrain.app import build_learner, plan_of, samples_of
from visiontrain.core.errors import DataError
from visiontrain.core.own import with_objects
from visiontrain.core.types import Batch, Place
from visiontrain.data.loader import unit_steps
from visiontrain.data.open import open_dataset
from visiontrain.engine.optim import Schedule
from visiontrain.engine.step import train_step
from visiontrain.engine.trace import exact_convolutions, fingerprints
from visiontrain.models.registry import build_model
from visiontrain.recipe import Run
from visiontrain.strategies.config import ParameterServer
from visiontrain.strategies.parameter_server.ledger import Unit
from visiontrain.strategies.parameter_server.rules import rules_of, shares_of, terms_of
from visiontrain.strategies.parameter_server.shard import Held, Shard
from visiontrain.strategies.parameter_server.talk import Link, Talk
from visiontrain.strategies.parameter_server.worker import Computing, Elastic, work
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.remote import Remote
from visiontrain.tasks.registry import as_task

CPU = torch.device("cpu")


def run_of(remote: Remote) -> tuple[Run, ParameterServer]:
    """Read the run that a process works for."""
    run = with_objects(Run.model_validate_json(remote.run_json), remote.objects)
    assert isinstance(run.strategy, ParameterServer)
    return run, run.strategy


def build_shard(remote: Remote, number: int) -> Shard:
    """Make what a server holds; its weights come from the driver."""
    run, config = run_of(remote)
    strategy = Held(Place(CPU), Precision(run.precision, CPU), frozenset(remote.parts[number]))
    rules = rules_of(config, run.optim.kind)
    batch = min(run.batch, remote.images) * rules.batch_share
    schedule = Schedule(run.optim, run.epochs, remote.images, batch)
    model = build_model(run.model, len(remote.names), run.task.kind)
    learner = build_learner(run, model, remote.names, schedule, strategy)
    return Shard(learner, strategy, rules)


def compute(remote: Remote, name: str, link: Link) -> None:
    """Be a worker until the run is over.

    Raises:
        DataError: the data here are not those of the process that was started.
    """
    run, config = run_of(remote)
    spec = open_dataset(run.data, run.task.kind)
    table = spec.cut(as_task(spec.table("train"), run.task))
    if table.digest() != remote.digest:
        raise DataError(
            f"data: {len(table)} images in train on {gethostname()}, or other labels than where "
            "the run was started; put the same files on every machine"
        )
    place = Place(torch.device(remote.device), local_world=config.processes)
    talk = Talk(name, terms_of(config, remote.parts), link)
    strategy = worker_of(config, place, Precision(run.precision, place.device), talk)
    schedule = Schedule(run.optim, run.epochs, remote.images, min(run.batch, remote.images))
    model = build_model(run.model, len(remote.names), run.task.kind)
    plain = run.model_copy(update={"ema": False})  # servers average
    updates = config.sync == "easgd"
    learner = build_learner(plain, model, remote.names, schedule, strategy, updates=updates)
    data = samples_of(run, table)
    plan = plan_of(run, strategy)
    # Loaders claim ahead: what one worker claims no other can take.
    plan = replace(plan, shard=(0, shares_of(config)), workers=min(1, plan.workers))

    def source(units: Iterator[Unit]) -> Iterator[Sequence[Batch]]:
        return (step.micro_batches for step in unit_steps(data, plan, units))

    def step(micro_batches: Sequence[Batch]) -> None:
        train_step(learner, micro_batches, 0)

    rows = (lambda n, batch: fingerprints(n, batch).tolist()) if remote.traced else None
    with exact_convolutions() if remote.traced else nullcontext():
        work(learner, strategy, source, step, rows)


def worker_of(
    config: ParameterServer, place: Place, precision: Precision, talk: Talk
) -> Computing | Elastic:
    """Make a worker's side of the mode."""
    shares = shares_of(config)
    if config.sync != "easgd":
        return Computing(place, precision, talk, shares)
    pull = config.elasticity / config.processes
    return Elastic(place, precision, talk, shares, config.meet_every, pull)
