"""Fully sharded data parallel: parameters, gradients, optimizer and average are cut over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from visiontrain.core.interfaces import StateDict, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss
from visiontrain.strategies import comm
from visiontrain.strategies.processes import Processes


class FSDP(Processes):
    """Each block of the model is one shard group, gathered just before it runs."""

    _model: FSDPModule

    def setup(self, model: VisionModel) -> None:
        # torch warns of views, which in-place writes would cut off; blocks never write in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        super().setup(model)
        mesh = init_device_mesh(self.place.device.type, (self.place.world,))
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh)
        self._model = fully_shard(model, mesh=mesh)  # in place: `model` is this object
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # terms are sums, so no mean
                module.set_force_sum_reduction_for_comms(True)  # gloo lacks fp32's PREMUL_SUM

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        # Weights are gathered for each forward and each backward, gradients scattered once.
        whole = sum(p.nbytes for p in learner.model.parameters())
        times = 2 * len(micro_batches) + 1
        self.bytes_sent += times * comm.ring_bytes(whole, self.place.world)
        return super().forward_backward(learner, micro_batches)

    def sync_buffers(self, model: VisionModel) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def collect(self, tensors: Mapping[str, Tensor]) -> StateDict:
        whole = {k: t.full_tensor() if isinstance(t, DTensor) else t for k, t in tensors.items()}
        return super().collect(whole)

    def scatter(self, whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in into.items():
                value = whole[name].to(self.place.device, tensor.dtype)
                if isinstance(tensor, DTensor):
                    value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
                self.local(tensor).copy_(self.local(value))

    @contextmanager
    def grad_sync(self, *, enabled: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(enabled)
        yield

    def sum_shards(self, value: Tensor) -> Tensor:
        return comm.all_sum(value)
