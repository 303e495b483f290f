"""What a training will need, before it runs: memory per process, waiting, bytes that travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from visiontrain.strategies.comm import ring_bytes
from visiontrain.strategies.profile import BlockCost
from visiontrain.strategies.stage import owner
from visiontrain.strategies.timeline import orders, play

# Of what tensors hold at most, what the allocator and kernels need beside it (measured: README).
BESIDE = 1.1


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a training: its model was measured on a few images."""

    costs: Sequence[BlockCost]  # of all blocks, on `images` images
    images: int
    loss: int  # bytes at most beside what blocks keep, on `images` images
    image: int  # bytes of one
    states: float  # numbers that the optimizer keeps per trained parameter
    average: bool  # whether weights are averaged
    recompute: bool  # whether blocks keep only what goes from block to block
    batch: int
    accumulate: int
    base: int  # bytes of a process that has no model yet


@dataclass(frozen=True, slots=True)
class Need:
    """What one process holds at most, bytes."""

    weights: int  # and buffers
    gradients: int
    optimizer: int
    average: int
    activations: int  # images and the loss among them
    resident: int  # all of that, and what surrounds it

    @property
    def tensors(self) -> int:
        """Bytes in tensors."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a mode needs."""

    mode: str
    needs: Sequence[Need]  # of each kind of process: a pipeline's differ
    sent: int  # bytes that the process that sends most sends per step
    bubble: float = 0.0  # share of the time that processes wait for each other's stages
    stages: Sequence[str] = ()  # the first block of each but the first

    def fits(self, memory: float) -> bool:
        """Tell whether every process has enough."""
        return all(need.resident <= memory for need in self.needs)


def single(facts: Facts) -> Forecast:
    """Everything in one process."""
    images = -(-facts.batch // facts.accumulate)
    return Forecast("single", [_whole(facts, images, 1)], 0)


def ddp(facts: Facts, devices: int) -> Forecast:
    """The whole model everywhere, and a share of each batch; gradients in buckets beside it."""
    images = -(-facts.batch // (facts.accumulate * devices))
    gradients = sum(cost.trained for cost in facts.costs)
    return Forecast("ddp", [_whole(facts, images, 1)], 2 * ring_bytes(gradients, devices))


def fsdp(facts: Facts, devices: int) -> Forecast:
    """Shares of everything, and of the blocks at work all of it."""
    images = -(-facts.batch // (facts.accumulate * devices))
    weights = sum(cost.parameters for cost in facts.costs)
    trained = sum(cost.trained for cost in facts.costs)
    backward = sum(cost.parameters for cost in facts.costs if cost.trained)
    sent = facts.accumulate * (weights + backward) + trained
    need = _whole(facts, images, devices)
    return Forecast("fsdp", [need], ring_bytes(sent, devices))


def pipeline(
    facts: Facts, devices: int, schedule: str, first: Sequence[int], copies: int = 1
) -> Forecast:
    """Each process some runs of blocks, over all micro-batches that its schedule lets in.

    Args:
        facts: of the training.
        devices: processes of all pipelines.
        schedule: as `strategy.schedule`.
        first: the first block of each stage.
        copies: pipelines side by side.
    """
    depth = devices // copies
    micro = max(facts.accumulate, depth)
    images = -(-facts.batch // (micro * copies))
    bounds = list(pairwise([*first, len(facts.costs)]))
    parts = [facts.costs[begin:end] for begin, end in bounds]
    scale = images / facts.images
    line = play(
        orders(schedule, depth, micro),
        [scale * sum(cost.forward for cost in part) for part in parts],
        [scale * sum(cost.backward for cost in part) for part in parts],
    )
    needs, sent = [], []
    for rank in range(depth):
        mine = [s for s in range(len(parts)) if owner(s, schedule, depth) == rank]
        blocks = [cost for s in mine for cost in parts[s]]
        kept = scale * sum(line.held[s] * _kept(cost, facts) for s in mine for cost in parts[s])
        kept += scale * max(_again(cost, facts) for cost in blocks)
        if 0 in mine:
            kept += facts.image * images * micro
        if len(parts) - 1 in mine:
            kept += facts.loss * scale
        gradients = sum(cost.trained for cost in blocks)
        needs.append(_need(facts, blocks, 1, gradients, round(kept)))
        crossed = sum(_crossing(parts, s, rank, schedule, depth) for s in mine)
        travel = round(micro * scale * crossed)
        sent.append(travel + 2 * ring_bytes(gradients, copies))
    names = [facts.costs[place].name for place in first[1:]]
    return Forecast(f"pipeline, {schedule}", needs, max(sent), line.bubble, names)


def _crossing(
    parts: Sequence[Sequence[BlockCost]], stage: int, rank: int, schedule: str, depth: int
) -> int:
    """Count what a stage sends forwards, and back to the stage before: gradients are as large."""
    sent = 0
    if stage + 1 < len(parts) and owner(stage + 1, schedule, depth) != rank:
        sent += parts[stage][-1].passed
    if stage and owner(stage - 1, schedule, depth) != rank:
        sent += parts[stage - 1][-1].passed_back
    return sent


def _whole(facts: Facts, images: int, shares: int) -> Need:
    """Return what a process needs that runs all blocks, and holds one of `shares` of them."""
    scale, kept = images / facts.images, [_kept(cost, facts) for cost in facts.costs]
    trained = [cost.trained for cost in facts.costs]
    # Gradients come up from the last block while activations go; those of earlier micro-batches
    # are all there, and whole, also where weights are shared out.
    there = sum(trained) if facts.accumulate > 1 else 0
    moments = [(scale * (sum(kept) + facts.loss), there)]
    for n, cost in enumerate(facts.costs):
        at_work = sum(kept[: n + 1]) + _again(cost, facts) + cost.given
        moments.append((scale * at_work, there or sum(trained[n + 1 :]) // shares))
    peak, gradients = max(moments, key=sum)
    peak += facts.image * images * facts.accumulate
    if shares > 1:
        largest = sorted((cost.parameters for cost in facts.costs), reverse=True)
        peak += sum(largest[:2]) + largest[0]  # at work, fetched ahead, and on its way
    blocks = list(facts.costs)
    return _need(facts, blocks, shares, gradients, round(peak))


def _need(
    facts: Facts, blocks: Sequence[BlockCost], shares: int, gradients: int, activations: int
) -> Need:
    weights = sum(cost.parameters for cost in blocks)
    buffers = sum(cost.buffers for cost in blocks)
    trained = sum(cost.trained for cost in blocks)
    need = Need(
        weights=weights // shares + buffers,
        gradients=gradients,
        optimizer=round(facts.states * trained / shares),
        average=weights // shares + buffers if facts.average else 0,
        activations=activations,
        resident=0,
    )
    resident = facts.base + round(BESIDE * need.tensors)
    return Need(
        need.weights, need.gradients, need.optimizer, need.average, need.activations, resident
    )


def _kept(cost: BlockCost, facts: Facts) -> int:
    """Return what a block keeps of the measured images until its backward pass begins."""
    return cost.given if facts.recompute else cost.kept


def _again(cost: BlockCost, facts: Facts) -> int:
    """Return what a block computes again when its backward pass begins."""
    return cost.kept - cost.given if facts.recompute else 0
