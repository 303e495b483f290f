"""Which images make which step: pure functions of (seed, epoch, step), whatever the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from visiontrain.data.order import SHUFFLED, Entries, Order

Key = tuple[int, int]  # epoch, entry of its order: row in the table + k * N the k-th time again


@dataclass(frozen=True, slots=True)
class Plan:
    """How the samples of a run are cut into steps, micro-batches and shares."""

    batch: int  # images per step, over all ranks
    epochs: int
    seed: int
    accumulate: int = 1  # micro-batches per step
    shard: tuple[int, int] = (0, 1)  # (index, total): this rank's share of each micro-batch
    workers: int = 0
    skipped: frozenset[int] = frozenset()  # steps left out


@dataclass(frozen=True, slots=True)
class StepKeys:
    """What one rank reads for one step."""

    epoch: int
    step: int  # counted over the whole run, from 0
    images: int  # in the global batch
    cells: tuple[tuple[Key, ...], ...]  # this rank's samples of each micro-batch, maybe none


def steps_per_epoch(images: int, batch: int) -> int:
    """Return how many steps an epoch of `images` takes; the last may be smaller."""
    return -(-images // batch)


def shares(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Cut `rows` into `parts` runs whose lengths differ by at most one."""
    return [part.tolist() for part in np.array_split(np.asarray(rows, np.int64), parts)]


def step_keys(images: int, plan: Plan, start: int, order: Order = SHUFFLED) -> Iterator[StepKeys]:
    """Yield what this rank reads, from step `start` to the end of the run."""
    per_epoch = steps_per_epoch(images, plan.batch)
    for epoch in range(start // per_epoch, plan.epochs):
        entries = order(images, plan.seed, epoch)
        for k in range(max(0, start - epoch * per_epoch), per_epoch):
            step = epoch * per_epoch + k
            if step in plan.skipped:
                continue
            yield keys_of(entries, plan, epoch, k)


def keys_of(entries: Entries, plan: Plan, epoch: int, k: int) -> StepKeys:
    """Return what one rank reads for step `k` of an epoch.

    Args:
        entries: of the epoch, in order.
        plan: how they are cut.
        epoch: its number.
        k: counted over the epoch, from 0.
    """
    index, total = plan.shard
    taken = entries[k * plan.batch : (k + 1) * plan.batch].tolist()
    cells = (shares(part, total)[index] for part in shares(taken, plan.accumulate))
    keyed = tuple(tuple((epoch, entry) for entry in cell) for cell in cells)
    return StepKeys(epoch, epoch * steps_per_epoch(len(entries), plan.batch) + k, len(taken), keyed)


def unit_keys(
    images: int, plan: Plan, units: Iterator[tuple[int, int]], order: Order = SHUFFLED
) -> Iterator[StepKeys]:
    """Yield what is read for single shares of steps, in any order: (step, share).

    Args:
        images: in an epoch.
        plan: how steps are cut; into how many shares is `shard[1]`.
        units: what is asked for.
        order: of the images.
    """
    per_epoch, latest = steps_per_epoch(images, plan.batch), (-1, np.empty(0, np.int64))
    for step, share in units:
        epoch, k = divmod(step, per_epoch)
        if epoch != latest[0]:
            latest = epoch, order(images, plan.seed, epoch)
        yield keys_of(latest[1], replace(plan, shard=(share, plan.shard[1])), epoch, k)
