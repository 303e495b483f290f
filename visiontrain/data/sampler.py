"""Which images make which step: pure functions of (seed, epoch, step), whatever the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator
from visiontrain.data.windows import Windows

Key = tuple[int, int]  # epoch, row in the table


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


def order(images: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which `epoch` visits the rows."""
    return generator(seed, "order", epoch).permutation(images)


def shares(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Cut `rows` into `parts` runs whose lengths differ by at most one."""
    return [part.tolist() for part in np.array_split(np.asarray(rows, np.int64), parts)]


def step_keys(
    images: int, plan: Plan, start: int, windows: Windows | None = None
) -> Iterator[StepKeys]:
    """Yield what this rank reads, from step `start` to the end of the run.

    Of shards, some at a time are read: `windows` says which.
    """
    per_epoch = steps_per_epoch(images, plan.batch)
    index, total = plan.shard
    for epoch in range(start // per_epoch, plan.epochs):
        where = (plan.seed, epoch)
        rows = order(images, *where) if windows is None else windows.order(*where)
        for k in range(max(0, start - epoch * per_epoch), per_epoch):
            step = epoch * per_epoch + k
            if step in plan.skipped:
                continue
            taken = rows[k * plan.batch : (k + 1) * plan.batch].tolist()
            cells = (shares(part, total)[index] for part in shares(taken, plan.accumulate))
            keyed = tuple(tuple((epoch, row) for row in cell) for cell in cells)
            yield StepKeys(epoch, step, len(taken), keyed)
