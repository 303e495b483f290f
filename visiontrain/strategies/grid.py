"""Pipelines side by side: ranks in rows of one pipeline, and in columns that hold the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from visiontrain.core.types import Place
from visiontrain.strategies.comm import subgroup


@dataclass(frozen=True, slots=True)
class Grid:
    """Where a rank stands: rank = row * depth + place in the row."""

    rank: int
    depth: int  # processes of a pipeline
    copies: int  # pipelines
    row: dist.ProcessGroup | None = None  # this pipeline's; None: all ranks
    column: dist.ProcessGroup | None = None  # those that hold the same stages; None: this one

    @property
    def place(self) -> int:
        """Place in the row, from 0."""
        return self.rank % self.depth

    @property
    def number(self) -> int:
        """Which pipeline this one is, from 0."""
        return self.rank // self.depth

    def peer(self, place: int) -> int:
        """Return the rank at `place` of this row."""
        return self.rank - self.place + place

    def sum_row(self, value: Tensor) -> Tensor:
        """Sum over this pipeline's processes, into a new tensor."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.row)
        return value

    @torch.no_grad()
    def sum_column(self, tensors: Sequence[Tensor]) -> int:
        """Sum tensors in place over the ranks that hold the same; return the bytes of one copy."""
        if self.column is None or not tensors:
            return 0
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.column)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return flat.nbytes

    def copy_column(self, tensors: Sequence[Tensor]) -> None:
        """Give all ranks that hold the same the values of the first."""
        for tensor in tensors if self.column is not None else ():
            dist.broadcast(tensor, self.place, group=self.column)


def form(place: Place, copies: int) -> Grid:
    """Form the groups of all rows and columns. Collective."""
    depth = place.world // copies
    if copies == 1:
        return Grid(place.rank, depth, copies)
    ranks = list(range(place.world))
    row = subgroup([ranks[n * depth : (n + 1) * depth] for n in range(copies)], place.device)
    column = subgroup([ranks[n::depth] for n in range(depth)], place.device)
    return Grid(place.rank, depth, copies, row, column)
