"""What powersgd costs a model: the bytes it sums, and the time it computes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.futures import Future

from visiontrain.core.types import Place
from visiontrain.strategies.compress import PowerSGD
from visiontrain.strategies.exchange import Bucket
from visiontrain.strategies.wire import Wire, done

ROUNDS = 5


@dataclass(frozen=True, slots=True)
class LowRank:
    """Of one step."""

    size: int  # bytes that are summed over devices
    seconds: float  # of computing


class _Alone(Wire):
    """Sums over this process alone, and counts what it would have summed."""

    def __init__(self, device: torch.device) -> None:
        self.place, self.summed = Place(device), 0

    def sum(self, values: Tensor) -> Future[Tensor]:
        self.summed += values.nbytes
        return done(values)


def low_rank(model: nn.Module, rank: int) -> LowRank:
    """Compress gradients of the model's shapes, some times; the median, but for the first.

    Args:
        model: where it trains.
        rank: of the matrices.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    some = next(iter(named.values()))
    buffer = torch.randn(sum(sizes), device=some.device, dtype=some.dtype)
    grads = [g.view_as(p) for g, p in zip(buffer.split(sizes), named.values(), strict=True)]
    wire = _Alone(some.device)
    powersgd, times = PowerSGD(wire, rank), []
    for _ in range(ROUNDS + 1):
        wire.summed = 0
        began = time.perf_counter()
        powersgd.reduce(Bucket(buffer, list(named), grads, last=True))
        for memory in powersgd.memories.values():
            memory.settle(torch.tensor(data=True, device=some.device))
        if some.device.type == "cuda":
            torch.cuda.synchronize(some.device)
        times.append(time.perf_counter() - began)
    return LowRank(wire.summed, statistics.median(times[1:]))
