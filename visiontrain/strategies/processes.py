"""What all modes of several processes share: how their ranks talk."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from visiontrain.strategies import comm
from visiontrain.strategies.base import Strategy


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
