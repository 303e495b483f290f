"""A pipeline's step on a network, played from what its model's blocks cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from visiontrain.strategies import forecast
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.forecast import Facts, flow_of
from visiontrain.strategies.links import Network
from visiontrain.strategies.profile import BlockCost
from visiontrain.strategies.speeds import Staged, Work
from visiontrain.strategies.stage import owner
from visiontrain.strategies.timeline import orders, play


def staged_of(
    facts: Facts, work: Work, network: Network, depth: int, config: Pipeline, first: Sequence[int]
) -> Staged:
    """Play a step of one pipeline of `depth` processes.

    Args:
        facts: of the training, whose blocks were measured.
        work: of a step of one device on its share: what blocks take is brought to it, and the
            pipeline's batch is `depth` shares.
        network: what it runs on.
        depth: processes.
        config: its schedule, and whether pipelines side by side share what they hold.
        first: the first block of each stage.
    """
    schedule, sharded = config.schedule, config.sharded
    facts = replace(facts, batch=depth * work.images)
    flow = flow_of(facts, schedule, depth, 1, sharded=False)
    bounds = list(pairwise([*first, len(facts.costs)]))
    parts = [facts.costs[begin:end] for begin, end in bounds]
    scale = flow.images / facts.images
    passes = sum(cost.forward + cost.backward for cost in facts.costs)
    fit = scale * (work.forward + work.backward) / (passes * work.images / facts.images)
    forward = [fit * sum(cost.forward for cost in part) for part in parts]
    backward = [fit * sum(cost.backward for cost in part) for part in parts]
    link = network.slowest(depth)
    sending = [
        (0.0, 0.0)
        if owner(stage, schedule, depth) == owner(stage + 1, schedule, depth)
        else (link.seconds(scale * part[-1].passed), link.seconds(scale * part[-1].passed_back))
        for stage, part in enumerate(parts[:-1])
    ]
    plans = orders(schedule, depth, flow.micro)
    mine: list[list[BlockCost]] = [[] for _ in range(depth)]
    for stage, part in enumerate(parts):
        mine[owner(stage, schedule, depth)] += part
    return Staged(
        name=f"pipeline of {depth}, {schedule}{', sharded' if sharded else ''}",
        depth=depth,
        alone=play(plans, forward, backward),
        sending=play(plans, forward, backward, sending),
        sent=forecast.pipeline(facts, depth, schedule, first).sent,
        summed=[forecast.summed(facts, blocks, sharded=sharded) for blocks in mine],
        times=max(map(len, mine)) if sharded else 1,
    )
