"""How the gradients of all ranks become one: what an exchange is, and the plain sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.futures import Future

from visiontrain.strategies.wire import Wire

# What a rank's gradients were divided by when the exchange gets them: by nothing, as sums over
# images; by the counts of the whole batch; by the counts of the rank's own share of it.
Units = Literal["sums", "batch", "own"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some gradients of this rank, which lie one after the other in one tensor."""

    buffer: Tensor  # (N,)
    names: Sequence[str]
    grads: Sequence[Tensor]  # views into `buffer`, each shaped as its parameter
    last: bool  # of this step


class Memory:
    """Named tensors that a step changes, unless it turns out to have failed."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    def get(self, name: str, first: Callable[[], Tensor]) -> Tensor:
        """Return what was kept of `name`; before there is anything, what `first` makes."""
        if name not in self._kept:
            self._kept[name] = first()
        return self._kept[name]

    def put(self, name: str, value: Tensor) -> None:
        """Keep `value` in the place of what `get` returned, once the step is good."""
        self._new[name] = value

    def settle(self, good: Tensor) -> None:
        """Keep what was put since the last call if `good` (); decided on the device."""
        for name, new in self._new.items():
            self._kept[name] = torch.where(good, new, self._kept[name])
        self._new = {}

    def state(self) -> dict[str, Tensor]:
        """Return what is kept."""
        return dict(self._kept)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` returned."""
        self._kept, self._new = dict(state), {}


class Exchange(Protocol):
    """What turns the gradients of all ranks into the one that is applied."""

    units: Units
    memories: Mapping[str, Memory]  # what steps leave for later ones

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Exchange one bucket during backward; the same order on every rank.

        Returns:
            What comes in the buffer's place, once it is known: with the last bucket at the latest.
        """
        ...


class Plain:
    """The sum over ranks: exactly one device's gradient."""

    units: Units = "sums"

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.memories: Mapping[str, Memory] = {}

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Sum; backward goes on meanwhile."""
        return self._wire.sum(bucket.buffer)
