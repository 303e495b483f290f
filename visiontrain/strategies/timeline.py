"""What a pipeline's schedule does when: how long its processes wait, and how much they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from visiontrain.strategies.stage import PER_PROCESS

# What is done: a forward pass, a backward pass, or its two halves: inputs' and weights'.
WAYS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
ENGINES = {
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "zero_bubble": "ScheduleInterleavedZeroBubble",
    "zbv": "ScheduleZBVZeroBubble",
}
Action = tuple[str, int, int]  # one of WAYS' letters, stage, micro-batch


@dataclass(frozen=True, slots=True)
class Timeline:
    """One step of a pipeline."""

    seconds: float  # from the first action to the end of the last
    busy: Sequence[float]  # seconds that each process works
    held: Sequence[int]  # of each stage: micro-batches at most between forward and backward

    @property
    def bubble(self) -> float:
        """Share of the time that processes wait."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def orders(schedule: str, depth: int, micro: int) -> list[list[Action]]:
    """Return what each of `depth` processes does, in its order, over `micro` micro-batches."""
    if schedule == "gpipe":
        both = [("F", range(micro)), ("B", range(micro))]
        return [[(way, rank, m) for way, all_ in both for m in all_] for rank in range(depth)]
    if schedule == "1f1b":
        return [_one_by_one(rank, depth, micro) for rank in range(depth)]
    from torch.distributed import pipelining  # noqa: PLC0415 - takes a second

    # Only numbers are asked of the stages for their order.
    count = PER_PROCESS[schedule] * depth
    stages = [
        SimpleNamespace(
            stage_index=number,
            num_stages=count,
            group_size=depth,
            group_rank=0,
            is_first=number == 0,
            is_last=number == count - 1,
            has_backward=True,
            submod=nn.Identity(),
        )
        for number in range(PER_PROCESS[schedule])
    ]
    engine: Any = getattr(pipelining, ENGINES[schedule])
    planned = engine(stages, n_microbatches=micro).pipeline_order
    return [
        [
            (WAYS[action.computation_type.name], action.stage_index, action.microbatch_index)
            for action in planned[rank]
            if action is not None and action.computation_type.name in WAYS
        ]
        for rank in range(depth)
    ]


def _one_by_one(rank: int, depth: int, micro: int) -> list[Action]:
    ahead = min(micro, depth - rank)
    actions: list[Action] = [("F", rank, m) for m in range(ahead)]
    for m in range(micro):
        actions.append(("B", rank, m))
        if ahead + m < micro:
            actions.append(("F", rank, ahead + m))
    return actions


def play(
    plans: Sequence[Sequence[Action]],
    forward: Sequence[float],
    backward: Sequence[float],
    sending: Sequence[tuple[float, float]] | None = None,
) -> Timeline:
    """Let every process work through its plan, each action as soon as what it needs is there.

    A backward pass in two halves takes half of its time each; the engine makes that of stage 0 in
    one, with the weights' half.

    Args:
        plans: as `orders` returns them.
        forward: seconds of each stage for one micro-batch.
        backward: the same.
        sending: seconds from each stage but the last to the next for one micro-batch, and back:
            one after the other each way, beside the computing; default: none.
    """
    done: dict[Action, float] = {}
    roads = _Roads(sending or [(0.0, 0.0)] * (len(forward) - 1))
    clocks, places = [0.0] * len(plans), [0] * len(plans)
    busy, now, most = [0.0] * len(plans), [0] * len(forward), [0] * len(forward)
    while any(place < len(plan) for place, plan in zip(places, plans, strict=True)):
        for rank, plan in enumerate(plans):
            while places[rank] < len(plan):
                action = plan[places[rank]]
                needs = _needs(action, len(forward))
                if any(need not in done for need in needs):
                    break
                seconds = _seconds(action, forward, backward)
                there = [roads.came.get((need, action[1]), done[need]) for need in needs]
                begin = max([clocks[rank], *there])
                clocks[rank] = done[action] = begin + seconds
                busy[rank] += seconds
                places[rank] += 1
                way, stage, micro = action
                if way == "I":  # all that the stage before waits for
                    done["B", stage, micro] = done[action]
                roads.send(action, done)
                now[stage] += {"F": 1, "I": 0}.get(way, -1)
                most[stage] = max(most[stage], now[stage])
    return Timeline(max(clocks), busy, most)


class _Roads:
    """What goes from stage to stage, each way one thing after the other."""

    def __init__(self, sending: Sequence[tuple[float, float]]) -> None:
        self._sending = sending
        self._free: dict[tuple[int, bool], float] = {}
        self.came: dict[tuple[Action, int], float] = {}  # what was done, to which stage, when

    def send(self, action: Action, done: Mapping[Action, float]) -> None:
        """Send what came of an action that is done."""
        way, stage, micro = action
        ahead = way == "F"
        road = stage if ahead else stage - 1
        if way == "W" or not 0 <= road < len(self._sending):
            return
        begin = max(done[action], self._free.get((road, ahead), 0.0))
        end = begin + self._sending[road][0 if ahead else 1]
        self._free[road, ahead] = end
        made: Action = ("F" if ahead else "B", stage, micro)
        self.came[made, stage + 1 if ahead else stage - 1] = end


def _needs(action: Action, stages: int) -> list[Action]:
    """Return what must be over; the half for the inputs goes by the name of the whole too."""
    way, stage, micro = action
    if way == "F":
        return [("F", stage - 1, micro)] if stage else []
    if way == "W":
        return [("I", stage, micro)]
    return [("F", stage, micro), *([("B", stage + 1, micro)] if stage + 1 < stages else [])]


def _seconds(action: Action, forward: Sequence[float], backward: Sequence[float]) -> float:
    way, stage, _ = action
    if way == "F":
        return forward[stage]
    if way == "B":
        return backward[stage]
    halves = {"I": 0.0, "W": 1.0} if stage == 0 else {"I": 0.5, "W": 0.5}
    return halves[way] * backward[stage]
