"""Muon: matrices step by momentum made orthogonal, everything else by AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from visiontrain.engine.eager import AdamW, Eager
from visiontrain.engine.sgd import finite

# Quintic Newton-Schulz iteration (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5
WIDE = 2  # columns per row from which the iteration is worked out on rows by rows
OTHERS = 0.04  # rate of AdamW as a share of Muon's, which is relative to the matrix


class Muon(Eager):
    """Weights of two or more dimensions step by Muon, vectors by AdamW at 0.04 of the rate.

    A convolution (out, in, k, k) counts as a matrix (out, in * k * k). Nesterov momentum and the
    scale of steps are those of Jordan et al. 2024; decay is apart from the gradient, as in AdamW.
    `found_inf` () is 1.0 to leave parameters and state bit-identical.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float]) -> None:
        super().__init__(split(groups), {"lr": 0.0, "weight_decay": 0.0})
        self._momentum = betas[0]
        self._matrices = [g for g in self.param_groups if any(map(is_matrix, g["params"]))]
        vectors = [g for g in self.param_groups if not any(map(is_matrix, g["params"]))]
        # It shares the groups, whose rates change, and the state, which is saved.
        self._others = AdamW(vectors, lr=0.0, betas=betas, fused=True) if vectors else None
        if self._others is not None:
            self._others.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyrefly: ignore
        """Update every parameter that has a gradient."""
        del closure
        if self._others is not None:
            self._others.found_inf = self.found_inf  # pyrefly: ignore
            self._others.step()
        for group in self._matrices:
            one, failed = group["params"][0], self.found_inf
            failed = None if failed is None else failed.to(one.device, one.dtype)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._turn(parameter, parameter.grad, group, failed)

    def _turn(
        self, parameter: Tensor, grad: Tensor, group: dict[str, Any], failed: Tensor | None
    ) -> None:
        buffer = self.state[parameter]["momentum_buffer"]
        grad, good = finite(grad, failed), 1.0 if failed is None else 1 - failed
        buffer.lerp_(grad, (1 - self._momentum) * good)
        step = torch.lerp(grad, buffer, self._momentum).flatten(1)
        turned = scaled(orthogonal(step)).view_as(parameter)
        parameter.mul_(1 - group["lr"] * group["weight_decay"] * good)
        parameter.add_(turned * (-group["lr"] * good))


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon moves it."""
    return parameter.ndim > 1


def split(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cut each group into its matrices and its other parameters, which move slower."""
    parts = []
    for group in groups:
        matrices = [p for p in group["params"] if is_matrix(p)]
        vectors = [p for p in group["params"] if not is_matrix(p)]
        if matrices or not vectors:  # a frozen stage has neither
            parts.append(group | {"params": matrices})
        if vectors:
            share = group.get("lr_share", 1.0) * OTHERS
            parts.append(group | {"params": vectors, "lr_share": share})
    return parts


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values of (R, C) near to 1, in the type it comes in."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    if x.shape[1] > WIDE * x.shape[0]:
        x = polynomial(x @ x.T) @ x
    else:
        for _ in range(ITERATIONS):
            x = iteration(x @ x.T) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def iteration(gram: Tensor) -> Tensor:
    """Return what (R, R) one iteration multiplies a matrix x by, from x x^T."""
    found = torch.addmm(gram, gram, gram, beta=B, alpha=C)
    found.diagonal().add_(A)
    return found


def polynomial(gram: Tensor) -> Tensor:
    """Return what (R, R) all iterations together multiply x by, from x x^T.

    What an iteration multiplies by is symmetric, and x x^T after it follows from x x^T before: so
    a wide matrix is multiplied twice in all. Of a 3 x 3 convolution that takes 0.4 of the time.
    """
    product = iteration(gram)
    factor = product
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = iteration(gram)
        product = factor @ product
    return product


def scaled(matrix: Tensor) -> Tensor:
    """Let tall matrices move as far per output as square ones."""
    return matrix * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
