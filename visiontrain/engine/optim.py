"""Optimizers, and the schedules: pure functions of the samples seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from torch.optim import AdamW, Optimizer

from visiontrain.engine.config import OptimConfig
from visiontrain.engine.muon import Muon
from visiontrain.engine.sgd import SGD

PEAK = {"adamw": 0.002, "sgd": 0.01, "muon": 0.01}


def kind_of(config: OptimConfig) -> str:
    """Resolve `auto`."""
    return "adamw" if config.kind == "auto" else config.kind


def peak(config: OptimConfig) -> float:
    """Return the highest learning rate."""
    return config.lr or PEAK[kind_of(config)]


def build_optimizer(config: OptimConfig, model: nn.Module) -> Optimizer:
    """Make the optimizer; norms and biases (one dimension or none) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]] or groups[:1]  # a frozen stage
    if kind_of(config) == "sgd":
        return SGD(groups, momentum=config.momentum)
    if kind_of(config) == "muon":
        return Muon(groups, momentum=config.momentum)
    # The fused kernel skips an update on the device when `found_inf` says so.
    return AdamW(groups, lr=0.0, betas=(config.momentum, config.beta2), fused=True)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate and weight average of a run of `total` samples in steps of `batch`."""

    config: OptimConfig
    epochs: int
    images: int  # per epoch
    batch: int

    @property
    def total(self) -> int:
        """Samples of the whole run."""
        return self.epochs * self.images

    def progress(self, samples: int) -> float:
        """Return the share of the run that is done, at most 1."""
        return min(1.0, samples / self.total)

    def lr(self, samples: int) -> float:
        """Return the rate of the step that starts after `samples`."""
        warmup = min(self.config.warmup * self.images, 0.1 * self.total)
        rise = min(1.0, (samples + self.batch) / warmup) if warmup else 1.0
        return peak(self.config) * rise * self._shape(self.progress(samples))

    def _shape(self, progress: float) -> float:
        last = self.config.lr_final
        if self.config.schedule == "cosine":
            return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2
        return 1.0 if self.config.schedule == "constant" else 1 - (1 - last) * progress

    def ema_share(self, samples: int) -> float:
        """Return the newest weights' share of their average in the step that starts there.

        The average reaches back over `ema_window` of the run so far, in a run of any length: a
        power-law average (Karras et al. 2024, arXiv 2312.02696). One with a fixed decay lags by
        most of a short run and smooths nothing in a long one.
        """
        return self.batch / (self.batch + self.config.ema_window * samples)
