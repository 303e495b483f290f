"""Fully sharded data parallel: parameters, gradients, optimizer and average are cut over ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from visiontrain.core.interfaces import StateDict, TensorSource, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss, Piece, Place
from visiontrain.strategies import comm
from visiontrain.strategies.base import on_cpu
from visiontrain.strategies.precision import LOWER, Precision
from visiontrain.strategies.processes import Processes

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


class Sharded(Processes):
    """Ranks that hold rows of the same tensors: how those are looked at, joined and cut."""

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many runs of rows this rank holds."""
        return self.place.rank, self.place.world

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def collect(self, tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> StateDict:
        wanted, whole = everywhere or self.place.is_main, {}
        for name, tensor in tensors.items():  # one at a time is whole on the device
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if wanted:
                whole[name] = on_cpu(value)
        return whole

    def shard(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        pieces = {}
        for name, tensor in tensors.items():
            start, stop = self._rows(tensor)
            if start < stop or (self.place.is_main and not tensor.numel()):
                pieces[name] = Piece(on_cpu(self.local(tensor)), start, tuple(tensor.shape))
        return pieces

    def scatter(self, whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy this process's rows out of whole tensors; of files, read no others."""
        cut = {name: tensor for name, tensor in into.items() if isinstance(tensor, DTensor)}
        super().scatter(whole, {name: t for name, t in into.items() if name not in cut})
        with torch.no_grad():
            for name, tensor in cut.items():
                start, stop = self._rows(tensor)
                if start < stop:
                    self.local(tensor).copy_(rows_of(whole, name, start, stop))

    def _rows(self, tensor: Tensor) -> tuple[int, int]:
        """Return which rows this process writes: its own, or as the main process of a whole."""
        rows = tensor.shape[0] if tensor.ndim else 1
        if not isinstance(tensor, DTensor):
            return 0, rows if self.place.is_main else 0
        place, count = self.part
        each = -(-rows // count)  # as torch.chunk cuts: the last may have fewer or none
        start = min(rows, each * place)
        return start, min(rows, start + each)

    def sum_shards(self, value: Tensor) -> Tensor:
        return comm.all_sum(value)


class FSDP(Sharded):
    """Each block of the model is one shard group, gathered just before it runs.

    Under bf16 and fp16 weights travel in that format, which convolutions and products would
    bring them to anyway; autocast decides on the rest, as in every mode.
    """

    _model: FSDPModule

    def __init__(
        self, place: Place, precision: Precision, *, reduce: str = "full", offload: bool = False
    ) -> None:
        super().__init__(place, precision)
        self._reduced = torch.bfloat16 if reduce == "bf16" else precision.weights
        # Pinned, so that copies to and from a GPU run beside its work.
        pinned = place.device.type == "cuda"
        self._offload = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
        self._bytes = {"forward": 0, "backward": 0, "gradients": 0}  # of all ranks together

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        lower = LOWER.get(self.precision.kind)
        self._count(model, lower or self.precision.weights)
        if lower is not None:
            read_norms_wide(model)
        mesh = init_device_mesh(self.place.device.type, (self.place.world,))
        formats = MixedPrecisionPolicy(lower, self._reduced, cast_forward_inputs=False)
        shard = partial(fully_shard, mesh=mesh, mp_policy=formats, offload_policy=self._offload)
        for block in model.blocks.values():
            shard(block)
        self._model = shard(model)  # in place: `model` is this object
        as_summed(model)

    def _count(self, model: VisionModel, weights: torch.dtype) -> None:
        """Note the bytes of what travels in a forward and a backward pass and with gradients."""
        sizes = {"forward": 0, "backward": 0, "gradients": 0}
        for block in model.blocks.values():
            every = sum(p.numel() for p in block.parameters())
            trained = sum(p.numel() for p in block.parameters() if p.requires_grad)
            sizes["forward"] += every * weights.itemsize
            # A block that is frozen whole has no backward pass.
            sizes["backward"] += every * weights.itemsize if trained else 0
            sizes["gradients"] += trained * self._reduced.itemsize
        self._bytes = sizes

    # -- state --------------------------------------------------------------------

    def sync_buffers(self, model: VisionModel) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    # -- the step -----------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        # Weights are gathered for each forward and each backward, gradients scattered once.
        gathered = self._bytes["forward"] + self._bytes["backward"]
        sent = len(micro_batches) * gathered + self._bytes["gradients"]
        self.bytes_sent += comm.ring_bytes(sent, self.place.world)
        return super().forward_backward(learner, micro_batches)

    @contextmanager
    def grad_sync(self, *, enabled: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(enabled)
        yield


def as_summed(model: nn.Module) -> None:
    """Have sharded modules sum gradients over ranks: terms are sums, so no mean."""
    # torch warns of views, which in-place writes would cut off; blocks never write in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo lacks fp32's PREMUL_SUM


def rows_of(whole: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Return some rows of a tensor that is in memory or in files."""
    if isinstance(whole, TensorSource):
        return whole.rows(name, start, stop)
    return whole[name][start:stop]


def read_norms_wide(model: nn.Module) -> None:
    """Let norms read their parameters in fp32, whatever format those travel in.

    Statistics stay fp32, and kernels want the parameters beside them to be so, too. The class of
    a module is changed as fully_shard does: names and everything else stay.
    """
    for module in model.modules():
        if isinstance(module, NORMS):
            module.__class__ = type("Wide", (_Wide, type(module)), {})


class _Wide(nn.Module):
    @property
    def weight(self) -> Tensor | None:
        value = self._parameters["weight"]
        return None if value is None else value.float()

    @property
    def bias(self) -> Tensor | None:
        value = self._parameters.get("bias")
        return None if value is None else value.float()
