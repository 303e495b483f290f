"""What travels in the place of gradients between a worker and the servers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from visiontrain.strategies.compress import HALVES, first_basis, orthonormal, pays
from visiontrain.strategies.config import ParameterServer
from visiontrain.strategies.exchange import Memory
from visiontrain.strategies.tensor_message import RefusedError

Named = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
VALUES, INDEX, LEFT, RIGHT = ".values", ".index", ".left", ".right"


class Encoding(Protocol):
    """A form that gradients travel in. Its shapes are the same at every step."""

    @property
    def memories(self) -> Mapping[str, Memory]:
        """What steps leave for later ones."""
        ...

    def fresh(self) -> Self:
        """Return one that remembers nothing."""
        ...

    def encode(self, gradients: Named) -> dict[str, Tensor]:
        """Turn a worker's gradients into what is sent."""
        ...

    def decode(self, sent: Named, shapes: Shapes) -> dict[str, Tensor]:
        """Turn it back, as far as it goes.

        Raises:
            RefusedError: it stands for nothing.
        """
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """All numbers, in the type of the weights or in 16 bits."""

    dtype: torch.dtype | None = None
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def fresh(self) -> Self:
        """Return itself: there is nothing to remember."""
        return self

    def encode(self, gradients: Named) -> dict[str, Tensor]:
        """Round, if need be; what is out of range becomes the largest there is."""
        if self.dtype is None:
            return dict(gradients)
        most = torch.finfo(self.dtype).max
        return {n: g.clamp(-most, most).to(self.dtype) for n, g in gradients.items()}

    def decode(self, sent: Named, shapes: Shapes) -> dict[str, Tensor]:
        """Take it as it is."""
        del shapes
        return {name: t if self.dtype is None else t.float() for name, t in sent.items()}


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest numbers of each matrix; the others come later (Lin et al. 2018).

    Each takes its place along, in four bytes. Vectors travel whole.
    """

    share: float
    memories: Mapping[str, Memory] = field(default_factory=lambda: {"error": Memory()})

    def fresh(self) -> Self:
        """Return one that owes nothing."""
        return self.__class__(self.share)

    def encode(self, gradients: Named) -> dict[str, Tensor]:
        """Choose, and remember what is left out."""
        sent, error = {}, self.memories["error"]
        for name, gradient in gradients.items():
            if gradient.ndim < 2:
                sent[name] = gradient
                continue
            flat = gradient.flatten()
            flat = flat + error.get(name, lambda flat=flat: torch.zeros_like(flat))
            count = math.ceil(self.share * len(flat))
            where = flat.abs().topk(count, sorted=False).indices
            error.put(name, flat.index_fill(0, where, 0.0))
            sent[name + VALUES], sent[name + INDEX] = flat[where], where.int()
        return sent

    def decode(self, sent: Named, shapes: Shapes) -> dict[str, Tensor]:
        """Put the numbers where they belong, zeros elsewhere."""
        made = {}
        for name, shape in shapes.items():
            if name in sent:
                made[name] = sent[name]
                continue
            values, where = sent[name + VALUES], sent[name + INDEX].long()
            size = math.prod(shape)
            if len(where) and not (int(where.min()) >= 0 and int(where.max()) < size):
                raise RefusedError(f"{name}: places outside of its {size} numbers")
            made[name] = values.new_zeros(size).index_add_(0, where, values).view(shape)
        return made


@dataclass(frozen=True, slots=True)
class LowRank:
    """Two thin matrices whose product is near the gradient, with error feedback.

    As PowerSGD (Vogels et al. 2019), but for each worker by itself: P = M Q with its own last Q,
    made orthonormal, Q = M^T P. Vectors, and matrices that would not get half as large, travel
    whole.
    """

    rank: int
    memories: Mapping[str, Memory] = field(
        default_factory=lambda: {"error": Memory(), "basis": Memory()}
    )

    def fresh(self) -> Self:
        """Return one that owes nothing and has a new basis."""
        return self.__class__(self.rank)

    def encode(self, gradients: Named) -> dict[str, Tensor]:
        """Find the two, and remember what they lack."""
        sent, error, bases = {}, self.memories["error"], self.memories["basis"]
        for name, gradient in gradients.items():
            if not pays(gradient, self.rank):
                sent[name] = gradient
                continue
            matrix = gradient.reshape(len(gradient), -1)
            matrix = matrix + error.get(name, lambda m=matrix: torch.zeros_like(m))
            drawn = first_basis(name, matrix, self.rank)
            kept = bases.get(name, lambda drawn=drawn: drawn)
            basis = torch.where(kept.norm(dim=0) > 0, kept, drawn)
            left = orthonormal(matrix @ basis)
            right = matrix.T @ left
            error.put(name, matrix - left @ right.T)
            bases.put(name, right)
            sent[name + LEFT], sent[name + RIGHT] = left, right
        return sent

    def decode(self, sent: Named, shapes: Shapes) -> dict[str, Tensor]:
        """Multiply."""
        return {
            name: sent[name]
            if name in sent
            else (sent[name + LEFT] @ sent[name + RIGHT].T).reshape(shape)
            for name, shape in shapes.items()
        }


ENCODINGS: dict[str, Callable[[ParameterServer], Encoding]] = {
    "none": lambda _: Whole(),
    "fp16": lambda _: Whole(HALVES["fp16"]),
    "bf16": lambda _: Whole(HALVES["bf16"]),
    "powersgd": lambda config: LowRank(config.powersgd_rank),
    "topk": lambda config: Largest(config.topk),
}
