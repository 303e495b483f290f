"""strategy.stages=auto: measure the model's blocks on this machine, and cut where it is fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from visiontrain.core.errors import ConfigError
from visiontrain.core.seed import seed_model
from visiontrain.data.config import sides
from visiontrain.data.open import open_dataset
from visiontrain.engine.optim import kind_of
from visiontrain.models.registry import build_model, check_input
from visiontrain.recipe import Run
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.cuts import anything, balance
from visiontrain.strategies.devices import devices, threads, world
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.profile import BlockCost, measure
from visiontrain.strategies.stage import PER_PROCESS
from visiontrain.strategies.timeline import orders, play

WAYS = ("forward", "backward")
IMAGES = 4  # at most, of what is measured: costs of blocks grow alike


def with_stages(run: Run, *, asked: bool) -> tuple[Run, list[str]]:
    """Replace stages=auto by names of blocks, so that config.yaml repeats the run.

    Args:
        run: a settled run.
        asked: whether the user named the stages; those of an earlier run, which may have had
            more or fewer processes, are chosen anew if they do not fit.

    Returns:
        the run, and lines that say what was measured and where the model is cut.
    """
    config = run.strategy
    if not isinstance(config, Pipeline):
        return run, []
    depth = world(config) // config.data_parallel
    count, micro = PER_PROCESS[config.schedule] * depth, max(run.accumulate, depth)
    if config.stages != "auto" and (asked or len(config.stages) + 1 == count):
        return run, []
    images = max(1, run.batch // (micro * config.data_parallel))
    classes = len(open_dataset(run.data, run.task.kind).names)
    costs = costs_of(run, classes, min(images, IMAGES))
    if len(costs) < count:
        raise ConfigError(
            f"strategy.processes: {depth} for a pipeline, which schedule={config.schedule} cuts "
            f"into {count} stages; the model has {len(costs)} blocks"
        )
    scale = images / min(images, IMAGES)
    first = within(run, costs, micro, scale)
    names = [costs[place].name for place in first[1:]]
    lines = table(costs, first, scale)
    waits = bubble(costs, first, config.schedule, micro)
    lines.append(f"bubble: {waits:.0%} of the time, in {micro} micro-batches")
    return run.model_copy(update={"strategy": config.model_copy(update={"stages": names})}), lines


def costs_of(run: Run, classes: int, images: int) -> list[BlockCost]:
    """Measure the blocks of a run's model on `images` images, with one process's threads."""
    assert isinstance(run.strategy, Pipeline)
    check_input(run.model, run.imgsz, run.task.kind)
    device, side = devices(run.device)[0], max(sides(run.imgsz, run.augment))
    before = torch.get_num_threads()
    torch.set_num_threads(threads(run.strategy))
    try:
        seed_model(run.seed)
        model = build_model(run.model, classes, run.task.kind)
        model.freeze(run.freeze)
        if run.recompute:
            model.recompute_blocks()
        precision = Precision(run.precision, device)
        model.to(device, precision.weights).train()
        pixels = torch.rand(max(2, images), 3, side, side, device=device)
        with precision.autocast(device):
            return measure(model, pixels.to(precision.images).contiguous())
    finally:
        torch.set_num_threads(before)


def cheapest(
    costs: Sequence[BlockCost], stages: int, fits: Callable[[int, int, int], bool] = anything
) -> list[int] | None:
    """Return the first block of each stage, so that the slowest that `fits` is fastest."""
    sent = [0, *(cost.passed for cost in costs)]
    return balance([cost.forward + cost.backward for cost in costs], sent, stages, fits)


def within(run: Run, costs: Sequence[BlockCost], micro: int, scale: float) -> list[int]:
    """Return `cheapest` of the stages whose processes keep to `strategy.memory`.

    A process of several stages gives each the same share of it.

    Raises:
        ConfigError: there are none.
    """
    config = run.strategy
    assert isinstance(config, Pipeline)
    depth = world(config) // config.data_parallel
    count = PER_PROCESS[config.schedule] * depth
    held = play(orders(config.schedule, depth, micro), [1.0] * count, [2.0] * count).held
    states = 2 if kind_of(run.optim) == "adamw" else 1

    def need(stage: int, begin: int, end: int) -> float:
        part = costs[begin:end]
        weights = sum(cost.parameters * (2 if run.ema else 1) for cost in part)
        trained = sum(cost.trained for cost in part) * (1 + states)
        return weights + trained + held[stage] * scale * sum(cost.kept for cost in part)

    if config.memory is None:
        found = cheapest(costs, count)
    else:
        each = config.memory * 2**30 / PER_PROCESS[config.schedule]
        found = cheapest(costs, count, lambda *stage: need(*stage) <= each)
    if found is None:
        raise ConfigError(
            f"strategy.memory: {config.memory:g}; no {count} stages of the model need as little, "
            "take more processes, a smaller batch or recompute=true"
        )
    return found


def bubble(costs: Sequence[BlockCost], first: Sequence[int], schedule: str, micro: int) -> float:
    """Return the share of the time that processes wait in `micro` micro-batches."""
    parts = [costs[a:b] for a, b in pairwise([*first, len(costs)])]
    times = [[sum(getattr(cost, way) for cost in part) for part in parts] for way in WAYS]
    return play(orders(schedule, len(parts) // PER_PROCESS[schedule], micro), *times).bubble


def table(costs: Sequence[BlockCost], first: Sequence[int], scale: float) -> list[str]:
    """Say of each stage which blocks it has, and what they cost for one micro-batch.

    Args:
        costs: of all blocks, for fewer images than a micro-batch has.
        first: the first block of each stage.
        scale: images of a micro-batch, over those that were measured.
    """
    bounds = [*first, len(costs)]
    lines = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        part = costs[begin:end]
        names = part[0].name if len(part) == 1 else f"{part[0].name} to {part[-1].name}"
        seconds = scale * sum(cost.forward + cost.backward for cost in part)
        weights = sum(cost.parameters for cost in part) / 2**20
        kept = scale * sum(cost.kept for cost in part) / 2**20
        sent = "" if end == len(costs) else f", sends {scale * part[-1].passed / 2**20:.1f} MiB"
        lines.append(
            f"stage {number}: {names}, {seconds:.3g} s, weights {weights:.1f} MiB, keeps "
            f"{kept:.0f} MiB{sent}"
        )
    return lines
