"""Optimizers that nothing compiles.

torch wraps methods of its optimizers for torch.compile. The first call of each imports the
compiler, sympy and FSDP: seconds at the start of every process, for what training here never uses.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import torch
from torch.optim import AdamW as Wrapped
from torch.optim import Optimizer


class Eager(Optimizer):
    """An optimizer whose methods are called as they are written."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own."""
        unwrap(Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        unwrap(Optimizer.zero_grad)(self, set_to_none)


class AdamW(Eager, Wrapped):
    """torch's AdamW."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore
        """Update every parameter that has a gradient."""
        unwrap(Wrapped.step)(self, closure)
