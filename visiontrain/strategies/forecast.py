"""What a training will need, before it runs: memory per process, waiting, bytes that travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from visiontrain.strategies.comm import ring_bytes
from visiontrain.strategies.profile import BlockCost
from visiontrain.strategies.stage import PER_PROCESS, owner, stages_of
from visiontrain.strategies.timeline import orders, play

# Of what tensors hold at most, what the allocator and kernels need beside it: docs/plan.md.
BESIDE = 1.1
WAYS = ("forward", "backward")


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
    base: int = 0  # bytes of a process that has no model yet
    gather: float = 1.0  # bytes of gathered weights, over those of weights that are kept

    @property
    def gathered(self) -> float:
        """Bytes of weights that fsdp gathers for both passes of a micro-batch.

        Blocks that do not train have no backward pass.
        """
        both = sum(cost.parameters * (2 if cost.trained else 1) for cost in self.costs)
        return self.gather * both

    def kept(self, cost: BlockCost) -> int:
        """Return what a block keeps of the measured images until its backward pass begins."""
        return cost.given if self.recompute else cost.kept

    def again(self, cost: BlockCost) -> int:
        """Return what a block computes again when its backward pass begins."""
        return cost.kept - cost.given if self.recompute else 0


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
    need = _whole(facts, images, 1, beside=gradients)
    return Forecast("ddp", [need], 2 * ring_bytes(gradients, devices))


def fsdp(facts: Facts, devices: int) -> Forecast:
    """Shares of everything, and of the blocks at work all of it."""
    images = -(-facts.batch // (facts.accumulate * devices))
    trained = sum(cost.trained for cost in facts.costs)
    sent = round(facts.accumulate * facts.gathered) + trained
    need = _whole(facts, images, devices)
    return Forecast("fsdp", [need], ring_bytes(sent, devices))


def pipeline(
    facts: Facts,
    devices: int,
    schedule: str,
    first: Sequence[int],
    copies: int = 1,
    *,
    sharded: bool = False,
) -> Forecast:
    """Each process some runs of blocks, over all micro-batches that its schedule lets in.

    Args:
        facts: of the training.
        devices: processes of all pipelines.
        schedule: as `strategy.schedule`.
        first: the first block of each stage.
        copies: pipelines side by side.
        sharded: whether these share what they hold.
    """
    depth = devices // copies
    bounds = list(pairwise([*first, len(facts.costs)]))
    parts = [facts.costs[begin:end] for begin, end in bounds]
    flow = flow_of(facts, schedule, depth, copies, sharded=sharded)
    scale = flow.images / facts.images
    forward, backward = (
        [scale * sum(getattr(c, way) for c in part) for part in parts] for way in WAYS
    )
    line = play(orders(schedule, depth, flow.micro), forward, backward)
    needs, sent = [], []
    for rank in range(depth):
        mine = stages_of(rank, schedule, depth)
        needs.append(staged(facts, flow, [(*bounds[s], line.held[s]) for s in mine]))
        crossed = sum(_crossing(parts, s, rank, schedule, depth) for s in mine)
        blocks = [cost for s in mine for cost in parts[s]]
        travel = round(flow.micro * scale * crossed)
        sent.append(travel + ring_bytes(summed(facts, blocks, sharded=sharded), copies))
    names = [facts.costs[place].name for place in first[1:]]
    return Forecast(f"pipeline, {schedule}", needs, max(sent), line.bubble, names)


def summed(facts: Facts, blocks: Sequence[BlockCost], *, sharded: bool) -> int:
    """Return the bytes that go round among pipelines side by side for a process's blocks.

    A sum is a reduce-scatter and an all-gather; who shares gathers weights in place of gradients.
    """
    if sharded:
        return sum(round(cost.parameters * facts.gather) + cost.trained for cost in blocks)
    return 2 * sum(cost.trained for cost in blocks)


@dataclass(frozen=True, slots=True)
class Flow:
    """What runs through a pipeline."""

    micro: int  # micro-batches
    images: int  # of each
    held: Sequence[int]  # of each stage, if all are equal: micro-batches between its two passes
    shares: int  # how many processes share what one holds


def flow_of(facts: Facts, schedule: str, depth: int, copies: int, *, sharded: bool) -> Flow:
    """Return what runs through a pipeline of `depth` processes."""
    micro, count = max(facts.accumulate, depth), PER_PROCESS[schedule] * depth
    held = play(orders(schedule, depth, micro), [1.0] * count, [2.0] * count).held
    images = -(-facts.batch // (micro * copies))
    return Flow(micro, images, held, copies if sharded else 1)


def staged(facts: Facts, flow: Flow, stages: Sequence[tuple[int, int, int]]) -> Need:
    """Return what a process needs for some stages.

    The engine keeps a place for what each micro-batch brings, from either side, all the time.

    Args:
        facts: of the training.
        flow: what runs through the pipeline.
        stages: of each the first block, the block after the last, and the micro-batches that
            it holds at most.
    """
    scale, last = flow.images / facts.images, len(facts.costs)
    blocks = [cost for begin, end, _ in stages for cost in facts.costs[begin:end]]
    kept = max(map(facts.again, blocks))
    for begin, end, held in stages:
        kept += held * sum(map(facts.kept, facts.costs[begin:end]))
        kept += flow.micro * facts.costs[begin - 1].passed if begin else 0
        kept += facts.loss if end == last else flow.micro * facts.costs[end - 1].passed_back
    activations = scale * kept + facts.image * flow.images * flow.micro
    if flow.shares > 1:  # weights are whole while micro-batches go through
        activations += facts.gather * sum(cost.parameters for cost in blocks)
    gradients = sum(cost.trained for cost in blocks)
    return _need(facts, blocks, flow.shares, gradients, round(activations))


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


def _whole(facts: Facts, images: int, shares: int, beside: int = 0) -> Need:
    """Return what a process needs that runs all blocks, and holds one of `shares` of them.

    Args:
        facts: of the training.
        images: of a micro-batch here.
        shares: how many processes share weights, optimizer and average.
        beside: bytes of gradients that lie there all the time.
    """
    scale, kept = images / facts.images, [facts.kept(cost) for cost in facts.costs]
    trained = [cost.trained for cost in facts.costs]
    # Gradients come up from the last block while activations go; those of earlier micro-batches
    # are all there, and whole, also where weights are shared out.
    there = sum(trained) if facts.accumulate > 1 else 0
    moments = [(scale * (sum(kept) + facts.loss), there)]
    for n, cost in enumerate(facts.costs):
        held = scale * (sum(kept[: n + 1]) + facts.again(cost) + cost.given)
        if shares > 1:  # weights at work, and those of the next: on their way, and where they go
            ahead = facts.costs[n - 1].parameters if n else 0
            held += facts.gather * (cost.parameters + 2 * ahead)
        moments.append((held, there or sum(trained[n + 1 :]) // shares))
    peak, gradients = max(moments, key=sum)
    peak += facts.image * images * facts.accumulate
    blocks = list(facts.costs)
    return _need(facts, blocks, shares, gradients + beside, round(peak))


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
