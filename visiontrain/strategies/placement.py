"""Naive placement: one process, whose blocks lie on several devices and run one after another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import VisionModel
from visiontrain.core.types import Place
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.cuts import counted, shapes_of, starts
from visiontrain.strategies.precision import LOWER, Precision


class Placement(Strategy):
    """A model that needs the memory of several devices; while one computes, the others wait.

    Outputs, loss and state of the run lie on the last device.
    """

    def __init__(self, place: Place, precision: Precision, stages: Sequence[str] | str) -> None:
        super().__init__(place, precision)
        self._devices, self._chosen = (*place.before, place.device), stages

    def setup(self, model: VisionModel) -> None:
        """Move each run of blocks to its device.

        Raises:
            ConfigError: there are fewer blocks than devices, or no such blocks, or the devices
                compute differently.
        """
        types = {device.type for device in self._devices}
        if len(types) > 1 and self.precision.kind in LOWER:
            raise ConfigError(
                f"precision: {self.precision.kind} on devices of different types; take fp32"
            )
        names, count = list(model.blocks), len(self._devices)
        if len(names) < count:
            raise ConfigError(f"device: {count} devices; the model has {len(names)} blocks")
        if isinstance(self._chosen, str):
            first = counted(shapes_of(model, self.precision.weights), count)
        else:
            first = starts(names, self._chosen, count)
        for device, (begin, end) in zip(self._devices, pairwise([*first, len(names)]), strict=True):
            for name in names[begin:end]:
                self.put(model.blocks[name], device)
                model.blocks[name].register_forward_pre_hook(carrying(device))


def carrying(device: torch.device) -> Any:
    """Return a hook that brings a block's inputs to its device; gradients go back the same way."""

    def carry(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del block
        return tuple(value.to(device) for value in inputs)

    return carry
