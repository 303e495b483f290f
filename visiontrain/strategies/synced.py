"""Synchronised BatchNorm on a process that has no image in a step."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn


class Joining(nn.SyncBatchNorm):
    """torch's layer, in which processes without an image can take part.

    It sends their statistics in the type of what comes in, but those of others in fp32, and gives
    no gradients: bytes would not fit together, and FSDP2 would leave its sums of gradients out.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise over the images of all processes."""
        if not self.training or len(input):
            return super().forward(input)
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        if not self.affine:
            return super().forward(wide)
        # Empty, so that it adds nothing; through it all parameters get a gradient, which is 0.
        shape = (1, -1, *(1 for _ in wide.shape[2:]))
        return super().forward(wide) + wide * self.weight.view(shape) + self.bias.view(shape)


def join_without_images(model: nn.Module) -> None:
    """Let the layers of a model that normalise over all processes be `Joining`."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm) and not isinstance(module, Joining):
            module.__class__ = _joining(type(module))


@cache
def _joining(kind: type[nn.SyncBatchNorm]) -> type[nn.SyncBatchNorm]:
    """Return `Joining` that does what `kind` adds, as timm's layers do."""
    return Joining if kind is nn.SyncBatchNorm else type(kind.__name__, (Joining, kind), {})
