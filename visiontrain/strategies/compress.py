"""Compression of gradients: what travels is smaller than the sum it stands for."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.futures import Future

from visiontrain.strategies import config as settings
from visiontrain.strategies.exchange import Bucket, Exchange, Memory, Plain, Units
from visiontrain.strategies.wire import Wire, done

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(slots=True)
class Half:
    """Sums in 16 bits. Nothing is remembered of what rounding takes."""

    wire: Wire
    dtype: torch.dtype
    units: Units = "batch"  # sums over images would leave the range of fp16
    memories: Mapping[str, Memory] = field(default_factory=dict)

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Sum; backward goes on meanwhile."""
        summed = self.wire.sum(bucket.buffer.to(self.dtype))
        return summed.then(lambda future: bucket.buffer.copy_(future.value()))


@dataclass(slots=True)
class PowerSGD:
    """Low-rank sums with error feedback (Vogels et al. 2019, arXiv 1905.13727).

    A matrix M, summed over ranks, becomes P Q^T: P = M Q with the last step's Q, made
    orthonormal, and Q = M^T P; two small sums instead of a large one. What each rank's own
    matrix lacks of its share is added to its next one. Matrices are (out, rest); vectors, and
    matrices that would not get half as large, travel whole.
    """

    wire: Wire
    rank: int
    units: Units = "batch"
    memories: Mapping[str, Memory] = field(
        default_factory=lambda: {"error": Memory(), "basis": Memory()}  # Q, alike on all ranks
    )
    _drawn: dict[str, Tensor] = field(default_factory=dict)  # first bases

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Exchange in two sums."""
        named = list(zip(bucket.names, bucket.grads, strict=True))
        low = {name: _matrix(grad) for name, grad in named if pays(grad, self.rank)}
        whole = [grad for _, grad in named if not pays(grad, self.rank)]
        matrices = {name: _owing(self.memories["error"], name, m) for name, m in low.items()}
        lefts = [m @ self._basis(name, m) for name, m in matrices.items()]
        *lefts, rest = self._sum([*lefts, _flat(whole, bucket.buffer)])
        lefts = [orthonormal(p) for p in lefts]
        rights = [m.T @ p for m, p in zip(matrices.values(), lefts, strict=True)]
        rights = self._sum(rights)
        _unflatten(rest, whole)
        for (name, grad), p, q in zip(
            ((n, g) for n, g in named if n in low), lefts, rights, strict=True
        ):
            summed = p @ q.T
            self.memories["error"].put(name, matrices[name] - summed / self.wire.place.world)
            self.memories["basis"].put(name, q)
            grad.copy_(summed.view_as(grad))
        return done(bucket.buffer)

    def _basis(self, name: str, matrix: Tensor) -> Tensor:
        """Return the last Q; its columns that are zero, and the first, are drawn alike everywhere.

        A column stays zero else, once a matrix was of lower rank.
        """
        if name not in self._drawn:
            self._drawn[name] = first_basis(name, matrix, self.rank)
        drawn = self._drawn[name]
        kept = self.memories["basis"].get(name, lambda: drawn)
        return torch.where(kept.norm(dim=0) > 0, kept, drawn)

    def _sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over ranks, in one collective."""
        if not tensors:
            return []
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.wire.sum(flat).wait()
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(slots=True)
class TopK:
    """The largest numbers of each matrix with error feedback (Lin et al. 2018, arXiv 1712.01887).

    Each rank sends its own largest, 8 bytes each; what it did not send is added to its next
    gradient. Vectors travel whole.
    """

    wire: Wire
    share: float  # of each matrix
    units: Units = "batch"
    memories: Mapping[str, Memory] = field(default_factory=lambda: {"error": Memory()})

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Exchange in a sum and two gathers."""
        named = list(zip(bucket.names, bucket.grads, strict=True))
        sparse = [(n, g) for n, g in named if g.ndim > 1]
        vectors = [g for _, g in named if g.ndim <= 1]
        rest = _flat(vectors, bucket.buffer)
        if vectors:
            self.wire.sum(rest).wait()
        values, indices, start = [], [], 0
        for name, grad in sparse:
            chosen, where = self._choose(name, grad)
            values.append(chosen)
            indices.append(where + start)
            start += grad.numel()
        if sparse:
            self._spread(torch.cat(values), torch.cat(indices), [g for _, g in sparse])
        _unflatten(rest, vectors)
        return done(bucket.buffer)

    def _choose(self, name: str, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the largest numbers of a gradient and where they lie; remember the others."""
        values = _owing(self.memories["error"], name, grad.flatten())
        count = math.ceil(self.share * len(values))
        where = values.abs().topk(count, sorted=False).indices
        self.memories["error"].put(name, values.index_fill(0, where, 0.0))
        return values[where], where

    def _spread(self, values: Tensor, indices: Tensor, grads: Sequence[Tensor]) -> None:
        """Replace gradients by the sum of what all ranks sent."""
        summed = values.new_zeros(sum(grad.numel() for grad in grads))
        all_values, all_indices = self.wire.gather(values), self.wire.gather(indices.int())
        for theirs, where in zip(all_values, all_indices, strict=True):
            summed.index_add_(0, where, theirs)
        _unflatten(summed, grads)


COMPRESSIONS: dict[str, Callable[[settings.DDP, Wire], Exchange]] = {
    "none": lambda _, wire: Plain(wire),
    "fp16": lambda _, wire: Half(wire, HALVES["fp16"]),
    "bf16": lambda _, wire: Half(wire, HALVES["bf16"]),
    "powersgd": lambda config, wire: PowerSGD(wire, config.powersgd_rank),
    "topk": lambda config, wire: TopK(wire, config.topk),
}


def pays(grad: Tensor, rank: int) -> bool:
    """Tell whether two matrices of a rank are half as large as a gradient, or smaller."""
    if grad.ndim < 2:
        return False
    rows, columns = len(grad), grad[0].numel()
    return 2 * rank * (rows + columns) <= rows * columns


def first_basis(name: str, matrix: Tensor, rank: int) -> Tensor:
    """Draw the first Q (columns of the matrix, rank): the same wherever it is drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    drawn = torch.randn(matrix.shape[1], rank, generator=generator)
    return drawn.to(matrix.device, matrix.dtype)


def orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns (n, r) by Gram and Schmidt; a column of zeros stays so.

    Each column is cleared twice, since once leaves what rounding left in a nearly dependent one.
    """
    tiny = torch.finfo(columns.dtype).tiny
    made: list[Tensor] = []
    for column in columns.unbind(1):
        length = column.norm()
        for _ in range(2):
            for other in made:
                column = column - (other @ column) * other  # noqa: PLW2901
        # Of a column that depends on the others only rounding is left.
        rest = column.norm()
        real = rest > length * 10 * torch.finfo(columns.dtype).eps
        made.append(column / rest.clamp(min=tiny) * real)
    return torch.stack(made, 1)


def _owing(errors: Memory, name: str, values: Tensor) -> Tensor:
    """Return values with what earlier steps did not send of them."""
    return values + errors.get(name, lambda: torch.zeros_like(values))


def _matrix(grad: Tensor) -> Tensor:
    return grad.reshape(len(grad), -1)


def _flat(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like.new_empty(0), *(tensor.flatten() for tensor in tensors)])


def _unflatten(flat: Tensor, into: Sequence[Tensor]) -> None:
    for part, tensor in zip(flat.split([t.numel() for t in into]), into, strict=True):
        tensor.copy_(part.view_as(tensor))
