"""Recomputation: a block's activations are dropped, and made again when its gradient needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Context = AbstractContextManager[None]


def recomputed(block: nn.Module, *inputs: Tensor) -> Any:
    """Run `block` and keep nothing but its inputs; its backward pass runs it once more.

    The second run draws the random numbers of the first and moves no statistics, so outputs,
    gradients and buffers are to the bit those of a block that keeps everything.
    """

    def contexts() -> tuple[Context, Context]:
        return nullcontext(), unmoved(block)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """Leave buffers (BatchNorm's statistics) as they were, however the block inside ends.

    Recomputation leaves a block by an exception as soon as it has all that was asked for.
    """
    before = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, old in zip(model.buffers(), before, strict=True):
            buffer.copy_(old)
