"""Stages of a pipeline: runs of blocks, and which process holds which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.core.seed import seed_model
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.cuts import starts
from visiontrain.strategies.precision import Precision

PER_PROCESS = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2, "zbv": 2}


def owner(stage: int, schedule: str, world: int) -> int:
    """Return the rank that holds `stage`: round after round, or for zbv down and up again."""
    turn, rank = divmod(stage, world)
    return world - 1 - rank if schedule == "zbv" and turn % 2 else rank


def stages_of(rank: int, schedule: str, world: int) -> list[int]:
    """List the stages that a rank of a pipeline holds, in order."""
    return [n for n in range(PER_PROCESS[schedule] * world) if owner(n, schedule, world) == rank]


def check_cuts(config: Pipeline, blocks: Sequence[str], processes: int) -> None:
    """Refuse more stages than blocks, and cuts between other blocks.

    Args:
        config: of the mode.
        blocks: names of the model's.
        processes: of all pipelines.

    Raises:
        ConfigError: naming the key.
    """
    depth = processes // config.data_parallel
    count = PER_PROCESS[config.schedule] * depth
    if len(blocks) == 1 < count:
        raise ConfigError(
            "strategy: pipeline, but the model is one block, which cannot be cut; take strategy=ddp"
        )
    if len(blocks) < count:
        raise ConfigError(
            f"strategy.processes: {depth} for a pipeline, which schedule={config.schedule} cuts "
            f"into {count} stages; the model has {len(blocks)} blocks"
        )
    if config.stages != "auto":
        starts(blocks, config.stages, count)


class Stage(nn.Module):
    """A run of blocks as the pipelining engine wants it: tensors in, tensors out."""

    def __init__(
        self, model: VisionModel, number: int, bounds: tuple[int, int], precision: Precision
    ) -> None:
        super().__init__()
        first, last = bounds
        names = list(model.blocks)
        self._model = [model]  # in a list: its other blocks are none of this module's
        self.names, self.precision = names[first:last], precision
        self.blocks = nn.ModuleDict({name: model.blocks[name] for name in self.names})
        self.number, self.bounds = number, bounds
        self.seeds: Iterator[Sequence[int]] = iter(())  # one for each micro-batch that comes
        self.takes = model.live(first) if first else (IMAGE,)
        self.gives = model.live(last) if last < len(names) else tuple(names[-1:])

    def forward(self, *values: Tensor) -> Any:
        """Map the values that are live before the first block to those after the last.

        They travel in the type of the weights: what autocast makes of them depends on the
        blocks, and the neighbours must know it beforehand.
        """
        (model,) = self._model
        if model.training:
            seed_model(*next(self.seeds))
        with self.precision.autocast(values[0].device):
            named = dict(zip(self.takes, map(Border.apply, values), strict=True))
            given = model.run(self.names, named, keep=self.gives)
        flat = given[0] if isinstance(given[0], tuple) else given
        # Contiguous, as sending wants them: some blocks permute, and a view would not travel.
        wide = (value.to(self.precision.weights).contiguous() for value in flat)
        wide = tuple(map(Border.apply, wide))
        return wide if len(wide) > 1 else wide[0]


class Border(torch.autograd.Function):
    """Nothing but what values may be at a stage's border.

    Schedules that cut the backward pass in two send gradients as autograd has them, in any
    strides, which sending refuses; and they cut outputs off in place, which views refuse.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyrefly: ignore
        """Return the same values, as no view of anything."""
        del ctx
        return value.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyrefly: ignore
        """Return the gradient in rows."""
        del ctx
        return grad.contiguous()
