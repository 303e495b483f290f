"""strategy.stages=auto: measure the model's blocks on this machine, and cut where it is fastest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from visiontrain.core.errors import ConfigError, OutOfMemoryError
from visiontrain.core.seed import seed_model
from visiontrain.data.config import sides
from visiontrain.data.open import open_dataset
from visiontrain.engine.optim import kind_of
from visiontrain.models.config import ModelConfig
from visiontrain.models.registry import build_model, check_input
from visiontrain.recipe import Run
from visiontrain.strategies.config import Pipeline, StrategyConfig, check_pipeline
from visiontrain.strategies.cuts import anything, balance, starts
from visiontrain.strategies.devices import devices, let_go, threads, world
from visiontrain.strategies.forecast import Facts, Flow, flow_of, pipeline, staged
from visiontrain.strategies.precision import LOWER, Precision
from visiontrain.strategies.profile import BlockCost, measure, recomputed
from visiontrain.strategies.stage import PER_PROCESS, check_cuts

IMAGES = 4  # at most, of what is measured: costs of blocks grow alike


def with_stages(run: Run, *, asked: bool) -> tuple[Run, list[str]]:
    """Replace stages=auto by names of blocks, so that config.yaml repeats the run.

    Args:
        run: a settled run.
        asked: whether the user named the stages; those of an earlier run, which may have had
            more or fewer processes, are chosen anew if they do not fit.

    Returns:
        the run, and lines that say what was measured and where the model is cut.

    Raises:
        ConfigError: there are too few blocks, or no stages that keep to `strategy.memory`.
    """
    config = run.strategy
    if not isinstance(config, Pipeline):
        return run, []
    depth = world(config) // config.data_parallel
    count, chosen = PER_PROCESS[config.schedule] * depth, config.stages
    named = chosen != "auto" and (asked or len(chosen) + 1 == count)
    if named and config.memory is None:
        with torch.device("meta"):
            blocks = list(build_model(run.model, classes_of(run), run.task.kind).blocks)
        check_cuts(config, blocks, world(config))
        return run, []
    facts = facts_of_blocks(run)
    names = [cost.name for cost in facts.costs]
    check_cuts(config.model_copy(update={"stages": "auto"}), names, world(config))
    if named and chosen != "auto":
        refuse_larger(config, facts, depth, starts(names, chosen, count))
        return run, []
    first = within(config, facts, depth)
    known = pipeline(facts, world(config), config.schedule, first, config.data_parallel)
    flow = flow_of(facts, config.schedule, depth, config.data_parallel, sharded=config.sharded)
    lines = table(facts, flow, first)
    lines.append(f"bubble: {known.bubble:.0%} of the time, in {flow.micro} micro-batches")
    stages = [names[place] for place in first[1:]]
    return run.model_copy(update={"strategy": config.model_copy(update={"stages": stages})}), lines


def check_uses(config: StrategyConfig, model: ModelConfig, classes: int, task: str) -> None:
    """Refuse to score or predict through a pipeline that the model cannot be cut for.

    Raises:
        ConfigError: naming the key.
    """
    if not isinstance(config, Pipeline):
        return
    check_pipeline(config, world(config), 1)
    with torch.device("meta"):
        blocks = list(build_model(model, classes, task).blocks)
    check_cuts(config, blocks, world(config))


def facts_of_blocks(run: Run) -> Facts:
    """Measure the blocks of a run's model with one process's threads, as a stage would run them.

    What the loss needs beside them is not known here.
    """
    config = run.strategy
    assert isinstance(config, Pipeline)
    check_input(run.model, run.imgsz, run.task.kind)
    micro = max(run.accumulate, world(config) // config.data_parallel)
    images = max(2, min(IMAGES, run.batch // (micro * config.data_parallel)))
    device, side = devices(run.device)[0], max(sides(run.imgsz, run.augment))
    precision = Precision(run.precision, device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads(config))
    try:
        costs = _costs(run, precision, device, (images, 3, side, side))
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"strategy.stages: auto, but {device} has no room to measure all blocks; name the "
            "first block of each stage but the first"
        ) from error
    finally:
        torch.set_num_threads(before)
        let_go()
    return Facts(
        costs=recomputed(costs) if run.recompute else costs,
        images=images,
        loss=0,
        image=3 * side * side * precision.images.itemsize,
        states=2.0 if kind_of(run.optim) == "adamw" else 1.0,
        average=run.ema,
        recompute=run.recompute,
        batch=run.batch,
        accumulate=run.accumulate,
        gather=0.5 if precision.kind in LOWER else 1.0,
    )


def _costs(
    run: Run, precision: Precision, device: torch.device, shape: tuple[int, int, int, int]
) -> list[BlockCost]:
    """Measure a run's blocks on pictures (B, 3, S, S)."""
    seed_model(run.seed)
    model = build_model(run.model, classes_of(run), run.task.kind)
    model.freeze(run.freeze)
    model.to(device, precision.weights).train()
    pixels = torch.rand(shape, device=device)
    with precision.autocast(device):
        return measure(model, pixels.to(precision.images).contiguous())


def classes_of(run: Run) -> int:
    """Return how many classes the data set of a run has."""
    return len(open_dataset(run.data, run.task.kind).names)


def cheapest(
    costs: Sequence[BlockCost], stages: int, fits: Callable[[int, int, int], bool] = anything
) -> list[int] | None:
    """Return the first block of each stage, so that the slowest that `fits` is fastest."""
    sent = [0, *(cost.passed for cost in costs)]
    return balance([cost.forward + cost.backward for cost in costs], sent, stages, fits)


def within(config: Pipeline, facts: Facts, depth: int) -> list[int]:
    """Return `cheapest` of the stages whose processes keep to `strategy.memory`.

    A process of several stages gives each the same share of it.

    Raises:
        ConfigError: there are none.
    """
    count = PER_PROCESS[config.schedule] * depth
    found = cheapest(facts.costs, count, fitting(config, facts, depth))
    if found is None:
        raise ConfigError(
            f"strategy.memory: {config.memory:g}; no {count} stages of the model need as little, "
            "take more processes, a smaller batch or recompute=true"
        )
    return found


def refuse_larger(config: Pipeline, facts: Facts, depth: int, first: Sequence[int]) -> None:
    """Refuse stages that were named and do not keep to `strategy.memory`.

    Raises:
        ConfigError: naming one.
    """
    fits = fitting(config, facts, depth)
    for stage, (begin, end) in enumerate(pairwise([*first, len(facts.costs)])):
        if not fits(stage, begin, end):
            raise ConfigError(
                f"strategy.memory: {config.memory:g}; stage {stage}, from "
                f"{facts.costs[begin].name}, needs more, take strategy.stages=auto or leave it out"
            )


def fitting(config: Pipeline, facts: Facts, depth: int) -> Callable[[int, int, int], bool]:
    """Return what tells whether a stage may have the blocks from one to before another."""
    if config.memory is None:
        return anything
    flow = flow_of(facts, config.schedule, depth, config.data_parallel, sharded=config.sharded)
    each = config.memory * 2**30 / PER_PROCESS[config.schedule]

    def fits(stage: int, begin: int, end: int) -> bool:
        return staged(facts, flow, [(begin, end, flow.held[stage])]).tensors <= each

    return fits


def table(facts: Facts, flow: Flow, first: Sequence[int]) -> list[str]:
    """Say of each stage which blocks it has, and what they cost for one micro-batch."""
    scale = flow.images / facts.images
    lines = []
    for number, (begin, end) in enumerate(pairwise([*first, len(facts.costs)])):
        part = facts.costs[begin:end]
        names = part[0].name if len(part) == 1 else f"{part[0].name} to {part[-1].name}"
        seconds = scale * sum(cost.forward + cost.backward for cost in part)
        weights = sum(cost.parameters for cost in part) / 2**20
        kept = scale * sum(map(facts.kept, part)) / 2**20
        sent = scale * part[-1].passed / 2**20
        passing = "" if end == len(facts.costs) else f", sends {sent:.1f} MiB"
        lines.append(
            f"stage {number}: {names}, {seconds:.3g} s, weights {weights:.1f} MiB, keeps "
            f"{kept:.0f} MiB{passing}"
        )
    return lines
