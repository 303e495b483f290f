"""A loss of a user's own in the place of a task's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Task
from visiontrain.core.types import Batch, Loss, Prediction, Views

HEAD = "all"  # one count divides the one term
TERM = f"{HEAD}/loss"
OwnLoss = Callable[[Any, Batch], Tensor]  # (a model's training outputs, batch) -> (B,)


@dataclass(frozen=True, slots=True)
class OwnLossTask:
    """A task whose loss is a function of the user's, with one number for each image.

    The step divides by the images of the whole batch, over all processes: so it is the same in
    every mode, however the batch is cut.
    """

    task: Task
    function: OwnLoss
    heads: tuple[str, ...] = (HEAD,)
    terms: tuple[str, ...] = (TERM,)

    @property
    def best(self) -> str:
        """The metric that picks the best checkpoint."""
        return self.task.best

    @property
    def views(self) -> Views:
        """How images are looked at to be scored."""
        return self.task.views

    def head_of(self, parameter: str) -> str:
        """Name the head that trains `parameter`: there is one."""
        del parameter
        return HEAD

    def loss(self, outputs: Any, batch: Batch, progress: float) -> Loss:
        """Add up what the function says of the images that count.

        Raises:
            ConfigError: it does not return one number for each image.
        """
        del progress
        # As within torch's autocast, which runs losses in fp32: exp and log of 16 bits are rough.
        each = self.function(tree_map(_wide, outputs), labelled(batch))
        if not isinstance(each, Tensor) or each.shape != batch.valid.shape:
            got = f"a tensor {tuple(each.shape)}" if isinstance(each, Tensor) else type(each)
            raise ConfigError(
                f"loss: returned {got} for {len(batch)} images; return one number for each, (B,)"
            )
        # Sums of bf16 would round, and counts over 256 with them, by mode.
        each = _wide(each)
        valid = batch.valid.to(each.dtype)
        each = torch.where(valid > 0, each, torch.zeros_like(each))
        # Outputs it leaves out must have gradients, too: modes sum those of all parameters.
        unused = sum(_nothing(output) for output in _listed(outputs))
        return Loss({TERM: (each * valid).sum() + unused}, {HEAD: valid.sum()})

    def decode(self, outputs: Any, batch: Batch) -> Sequence[Prediction]:
        """Turn evaluation outputs into predictions as the task does."""
        return self.task.decode(outputs, batch)


def labelled(batch: Batch) -> Batch:
    """Give images that only fill a place the first class, which functions for classes need."""
    targets = batch.targets.clone()
    first = targets[:, :1, 0]  # (B, 1), or (B, 0) where no image has a target
    targets[:, :1, 0] = torch.where(batch.valid[:, None] > 0, first, torch.zeros_like(first))
    return replace(batch, targets=targets)


def _wide(value: Any) -> Any:
    """Return floats in fp32 at least, all else as it is."""
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _nothing(output: Tensor) -> Tensor:
    """Return 0 that has the gradient 0 to an output, whatever is in it."""
    return (output.flatten()[:1].nan_to_num(0, 0, 0) * 0).sum()


def _listed(outputs: Any) -> Sequence[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
