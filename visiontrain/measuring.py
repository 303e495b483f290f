"""What a model costs on this machine: its blocks, its loss, and a whole step of one device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import torch

from visiontrain import app
from visiontrain.core.errors import ConfigError
from visiontrain.core.memory import resident
from visiontrain.core.own import objects_of
from visiontrain.core.types import Batch, Place
from visiontrain.data.loader import Step
from visiontrain.engine.learner import Learner
from visiontrain.engine.step import train_step
from visiontrain.recipe import Run, foreign
from visiontrain.staging import IMAGES
from visiontrain.strategies.config import Single
from visiontrain.strategies.devices import devices
from visiontrain.strategies.federated.messages import shared
from visiontrain.strategies.forecast import Facts
from visiontrain.strategies.live import LiveBytes
from visiontrain.strategies.low_rank import low_rank
from visiontrain.strategies.precision import LOWER
from visiontrain.strategies.profile import measure, recomputed
from visiontrain.strategies.speeds import Work

STEPS, SECONDS = 5, 8.0  # steps that are timed at most, and after which no further one begins
RANK = 2  # of powersgd's matrices, its default


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
    # What else is there: libraries, and the data, kept in memory or not.
    base = used(place.device) - sum(tensor.nbytes for tensor in held)
    batch = loaded.to(place.device, learner.strategy.precision.images)
    with learner.strategy.precision.autocast(place.device):
        costs = measure(learner.model, batch.images)
    states = [value for state in learner.optimizer.state.values() for value in state.values()]
    trained = sum(cost.trained for cost in costs)
    return Facts(
        costs=recomputed(costs) if run.recompute else costs,
        images=images,
        loss=loss_bytes(learner, batch),
        image=(loaded.images.nbytes + batch.images.nbytes) // images,
        states=sum(value.nbytes for value in states) / max(1, trained),
        average=run.ema,
        recompute=run.recompute,
        batch=run.batch,
        accumulate=run.accumulate,
        base=base,
        gather=0.5 if learner.strategy.precision.kind in LOWER else 1.0,
    )


def used(device: torch.device) -> int:
    """Return the bytes that this process holds; of a GPU, those that are not free."""
    if device.type != "cuda":
        return resident()
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def loss_bytes(learner: Learner, batch: Batch) -> int:
    """Return the bytes at most in tensors that the loss makes of a batch's outputs."""
    with learner.strategy.precision.autocast(batch.images.device):
        outputs = learner.model(batch.images)
    with LiveBytes() as live:
        learner.task.loss(outputs, batch, 0.0)
    return live.peak


def work_of(run: Run, facts: Facts, share: int) -> Work:
    """Measure a step of one device on its share of a batch, and what modes would send of it.

    The step is that of training, loading included; the median of five, but for the first.

    Args:
        run: the training, in any mode.
        facts: of its blocks: how a step divides into forward and backward pass.
        share: images of one device.
    """
    # Epochs without end, so that there are as many steps as are timed.
    alone = {"strategy": Single(), "batch": share, "epochs": 10**6}
    place = Place(devices(run.device)[0], 0, 1)
    small = run.model_copy(update=alone)
    learner, steps = app.build_traced(small.model_dump_json(), place, objects_of(run))
    scale = share / facts.images
    forward = scale * sum(cost.forward for cost in facts.costs)
    backward = scale * sum(cost.backward for cost in facts.costs)
    times, began = [], time.perf_counter()
    while len(times) < 2 or (len(times) <= STEPS and time.perf_counter() - began < SECONDS):
        times.append(timed_step(learner, steps))
    step_s = statistics.median(times[1:])
    rest = step_s - forward - backward
    if rest <= 0:  # blocks one by one took longer than all at once
        fit = step_s / (forward + backward)
        forward, backward, rest = fit * forward, fit * backward, 0.0
    live = learner.live
    low = low_rank(learner.model, RANK)
    return Work(
        forward=forward,
        backward=backward,
        rest=rest,
        images=share,
        gradients=sum(cost.trained for cost in facts.costs),
        weights=sum(cost.parameters for cost in facts.costs),
        gathered=facts.gathered,
        message=sum(live[name].nbytes for name in shared(learner.model, ()).down),
        blocks=len(facts.costs),
        parts=run.accumulate,
        low_rank=low.size,
        low_rank_s=low.seconds,
    )


def timed_step(learner: Learner, steps: Iterator[Step]) -> float:
    """Load and train one step; return the seconds it took."""
    began = time.perf_counter()
    step = next(steps)
    train_step(learner, step.micro_batches, step.images).grad_norm.item()
    return time.perf_counter() - began
