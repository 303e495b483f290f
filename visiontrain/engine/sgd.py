"""SGD whose update a flag on the device can suppress, also for sharded parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from visiontrain.engine.eager import Eager


class SGD(Eager):
    """Momentum, by default Nesterov's (Sutskever et al. 2013), and L2 weight decay.

    Equal to torch.optim.SGD; torch's fused kernel has the flag but no rule for sharded
    parameters, its other kernels the reverse. `found_inf` () is 1.0 to leave parameters and
    momentum bit-identical.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, momentum: float, nesterov: bool = True
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0})
        self.nesterov = nesterov

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore
        """Update every parameter that has a gradient."""
        del closure
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._move(params, group)

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        momentum, one = group["momentum"], params[0]
        failed = None if self.found_inf is None else self.found_inf.to(one.device, one.dtype)
        good = 1.0 if failed is None else 1 - failed
        grads = [finite(p.grad, failed) for p in params if p.grad is not None]
        if group["weight_decay"]:
            grads = torch._foreach_add(grads, torch._foreach_mul(params, group["weight_decay"]))
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, 1 - good * (1 - momentum))
        torch._foreach_add_(buffers, torch._foreach_mul(grads, good))
        steps = buffers
        if self.nesterov:
            steps = torch._foreach_add(grads, torch._foreach_mul(buffers, momentum))
        steps = torch._foreach_mul(steps, -group["lr"] * good)
        torch._foreach_add_(params, steps)


def finite(grad: Tensor, failed: Tensor | None) -> Tensor:
    """Zero a failed step's gradient: 0 * NaN would stay NaN."""
    return grad if failed is None else torch.where(failed > 0, torch.zeros_like(grad), grad)
