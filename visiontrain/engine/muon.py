"""Muon: momentum whose matrices are made orthogonal, mixed with plain SGD."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from visiontrain.engine.sgd import SGD, finite

# Quintic Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
ORTHOGONAL, PLAIN = 0.2, 1.0  # shares of the two steps, as in YOLO26 (arXiv 2606.03748)


class Muon(SGD):
    """Weights of two or more dimensions step by Muon and SGD, the others by SGD alone.

    Both steps come from one Nesterov momentum. A convolution (out, in, k, k) counts as a matrix
    (out, in * k * k).
    """

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in params:
            if parameter.grad is not None:
                self._turn(parameter, finite(parameter.grad, self.found_inf), group)

    def _turn(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        momentum, buffer = group["momentum"], self.state[parameter]["momentum_buffer"]
        failed = torch.zeros((), device=grad.device) if self.found_inf is None else self.found_inf
        good = 1 - failed.to(grad.dtype)
        buffer.mul_(1 - good * (1 - momentum)).add_(grad * good)
        step = grad + momentum * buffer
        if parameter.ndim > 1:
            step = PLAIN * step + ORTHOGONAL * scaled(orthogonal(step.flatten(1))).view_as(step)
        decayed = step + group["weight_decay"] * parameter
        parameter.add_(decayed * (-group["lr"] * good))


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of (R, C) near to 1, in the type it comes in."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def scaled(matrix: Tensor) -> Tensor:
    """Let tall matrices move as far per output as square ones."""
    return matrix * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
