"""The collectives that carry gradients, and how many bytes this rank sends in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from visiontrain.core.types import Place
from visiontrain.strategies.comm import ring_bytes, subgroup


class Wire:
    """Sums and gathers over all ranks; `take` tells the bytes since it was last asked."""

    def __init__(self, place: Place, topology: str, inner: int) -> None:
        """Join the groups that the topology needs. Collective.

        Args:
            place: of this process.
            topology: a key of TOPOLOGIES.
            inner: ranks of an inner ring, which are neighbours: those of one machine.
        """
        self.place, self._sent = place, 0
        self._sum = TOPOLOGIES[topology](place, inner)

    def sum(self, values: Tensor) -> Future[Tensor]:
        """Sum `values` over ranks, in place."""
        self._sent += self._sum.bytes(values.nbytes)
        return self._sum.begin(values)

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (N,) of all ranks, (W, N)."""
        self._sent += (self.place.world - 1) * values.nbytes
        rows = values.new_empty(self.place.world, len(values))
        dist.all_gather(list(rows.unbind()), values)
        return rows

    def take(self) -> int:
        """Return the bytes that were sent since the last call."""
        sent, self._sent = self._sent, 0
        return sent


class Flat:
    """One ring of all ranks."""

    def __init__(self, place: Place, inner: int) -> None:
        del inner
        self._world = place.world

    def bytes(self, whole: int) -> int:
        """Return what each rank sends: a reduce-scatter and an all-gather."""
        return 2 * ring_bytes(whole, self._world)

    def begin(self, values: Tensor) -> Future[Tensor]:
        """Start the sum; backward goes on meanwhile."""
        work = dist.all_reduce(values, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


class Hierarchical:
    """Rings inside machines, and between machines rings of one rank of each.

    Each rank sums 1/L of the values over its machine, then over machines, and its neighbours
    gather it: only 1/L of what a flat ring sends goes between machines (L ranks each).
    """

    def __init__(self, place: Place, inner: int) -> None:
        self._inner, self._outer = inner, place.world // inner
        ranks = torch.arange(place.world).reshape(self._outer, inner)
        self._near = subgroup(ranks.tolist(), place.device)
        self._far = subgroup(ranks.T.tolist(), place.device)

    def bytes(self, whole: int) -> int:
        """Return what each rank sends, inside its machine and to others."""
        part = -(-whole // self._inner)
        return 2 * ring_bytes(whole, self._inner) + 2 * ring_bytes(part, self._outer)

    def begin(self, values: Tensor) -> Future[Tensor]:
        """Sum at once."""
        padded = torch.nn.functional.pad(values, (0, -len(values) % self._inner))
        part = padded.new_empty(len(padded) // self._inner)
        _single("reduce_scatter")(part, padded, group=self._near)
        dist.all_reduce(part, group=self._far)
        _single("all_gather")(padded, part, group=self._near)
        values.copy_(padded[: len(values)])
        return done(values)


TOPOLOGIES: dict[str, Callable[[Place, int], Flat | Hierarchical]] = {
    "flat": Flat,
    "hierarchical": Hierarchical,
}


def done(values: Tensor) -> Future[Tensor]:
    """Return a future that is over."""
    future = pending(values.device)
    future.set_result(values)
    return future


def pending(device: torch.device) -> Future[Tensor]:
    """Return a future of a tensor on this device."""
    return Future(devices=[device] if device.type == "cuda" else None)


def _single(name: str) -> Callable[..., object]:
    """Find a collective of one tensor; torch renamed them in 2.14."""
    old = {"reduce_scatter": "reduce_scatter_tensor", "all_gather": "all_gather_into_tensor"}
    return getattr(dist, f"{name}_single", None) or getattr(dist, old[name])
