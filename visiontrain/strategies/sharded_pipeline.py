"""Pipelines side by side that also cut what each stage keeps over them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from visiontrain.core.interfaces import Updatable, VisionModel
from visiontrain.core.types import Batch, Loss
from visiontrain.strategies import comm
from visiontrain.strategies.fsdp import Sharded, as_summed
from visiontrain.strategies.pipeline import Pipeline
from visiontrain.strategies.stage import Stage


class ShardedPipeline(Pipeline, Sharded):
    """The processes that hold the same stage each keep some rows of its parameters (FSDP2).

    Weights are gathered once in a step, for all micro-batches, and gradients summed and
    scattered after the last.
    """

    _sizes: tuple[int, int]  # bytes of this process's stages: of weights, and of what trains

    @property
    def part(self) -> tuple[int, int]:
        return self._grid.number, self._grid.copies

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        mine = [p for stage in self._stages for p in stage.parameters()]
        self._sizes = (
            sum(p.nbytes for p in mine),
            sum(p.nbytes for p in mine if p.requires_grad),
        )
        column: Any = self._grid.column
        mesh = DeviceMesh.from_group(column, self.place.device.type)
        for stage in self._stages:
            for block in stage.blocks.values():
                fully_shard(block, mesh=mesh)
            fully_shard(stage, mesh=mesh)
            as_summed(stage)

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        with gathered(self._stages):
            return super().forward_backward(learner, micro_batches)

    def add_up(self, gradients: Sequence[Tensor]) -> int:
        """Nothing is left to do: the engine has reduced what the last backward pass made."""
        del gradients
        weights, trained = self._sizes
        return comm.ring_bytes(weights + trained, self._grid.copies)

    def sum_shards(self, value: Tensor) -> Tensor:
        return Sharded.sum_shards(self, value)


@contextmanager
def gathered(stages: Sequence[Stage]) -> Iterator[None]:
    """Keep weights whole from their first forward pass to the last backward pass of a step."""
    modules: list[Any] = [stage for stage in stages if isinstance(stage, FSDPModule)]
    for stage in modules:
        stage.set_reshard_after_forward(False)
    yield
    for stage in modules:
        stage.set_reshard_after_forward(True)
