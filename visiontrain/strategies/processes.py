"""What all modes of several processes share: how their ranks talk."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from visiontrain.core.errors import VisiontrainError
from visiontrain.core.interfaces import StateDict
from visiontrain.strategies import comm
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.member import describe, error_again

T = TypeVar("T")


class Processes(Strategy):
    """Several processes in one group; what each of them holds and reads is up to the mode."""

    def sum(self, values: Tensor) -> Tensor:
        return comm.all_sum(values)

    def any(self, *, flag: bool) -> bool:
        return comm.any_rank(flag=flag)

    def broadcast(self, value: Any) -> Any:
        return comm.broadcast_json(value)

    def gather(self, rows: Tensor) -> Tensor:
        return comm.gather_rows(rows, self.place.device)

    def share(self, tensors: StateDict) -> StateDict:
        return comm.broadcast_tensors(tensors, torch.device("cpu"), 0)

    def together(self, make: Callable[[], T]) -> T:
        made, failure = [], None
        try:
            made.append(make())
        except VisiontrainError as error:
            failure = error
        if not comm.any_rank(flag=failure is not None):
            return made[0]
        mine = describe(failure) | {"host": socket.gethostname()} if failure else None
        reports = [comm.broadcast_json(mine, rank) for rank in range(self.place.world)]
        if failure and all(reports):
            raise failure
        rank, report = next((rank, report) for rank, report in enumerate(reports) if report)
        report["message"] = f"{report['host']}: {report['message']} (rank {rank})"
        raise error_again(report, f"rank {rank}")
