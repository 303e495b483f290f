"""Optimizers, and the schedules: pure functions of the samples seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import VisionModel
from visiontrain.engine.config import OptimConfig
from visiontrain.engine.eager import AdamW, Eager
from visiontrain.engine.muon import Muon
from visiontrain.engine.sgd import SGD

PEAK = {"adamw": 0.002, "sgd": 0.01, "muon": 0.02}
# Places and tokens of transformers: matrices by shape only.
UNDECAYED = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table")


def kind_of(config: OptimConfig) -> str:
    """Resolve `auto`."""
    return "adamw" if config.kind == "auto" else config.kind


def peak(config: OptimConfig) -> float:
    """Return the highest learning rate."""
    return config.lr or PEAK[kind_of(config)]


def build_optimizer(config: OptimConfig, model: VisionModel) -> Optimizer:
    """Make the optimizer; norms, biases and places do not decay, the body may move slower.

    Raises:
        ConfigError: rates of the body or its blocks were asked for, but there are none.
    """
    _check_rates(config, model)
    # Kernels for lists take what lies on one device: a model may be spread over several.
    groups: dict[tuple[float, float, torch.device], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim <= 1 or name.endswith(UNDECAYED)
            decay = 0.0 if bare else config.weight_decay
            key = (share_of(config, model, name), decay, parameter.device)
            groups.setdefault(key, []).append(parameter)
    listed = [
        {"params": params, "lr_share": share, "weight_decay": decay}
        for (share, decay, _), params in groups.items()
    ] or [{"params": [], "lr_share": 1.0}]  # a frozen stage
    if kind_of(config) == "sgd":
        return SGD(listed, momentum=config.momentum, nesterov=config.nesterov)
    if kind_of(config) == "muon":
        return Muon(listed, betas=(config.momentum, config.beta2))
    # The fused kernel skips an update on the device when `found_inf` says so.
    return AdamW(listed, lr=0.0, betas=(config.momentum, config.beta2), fused=True)


def _check_rates(config: OptimConfig, model: VisionModel) -> None:
    """Refuse rates that would be nobody's."""
    for key in ("body_lr", "layer_decay"):
        if getattr(config, key) != 1 and not model.body:
            raise ConfigError(
                f"optim.{key}: {getattr(config, key)}; this model names no body, leave it out (a "
                "VisionModel names one in `body`)"
            )
    if config.layer_decay < 1 and 1 in (len(model.body), len(model.blocks)):
        raise ConfigError(
            f"optim.layer_decay: {config.layer_decay}; this backbone is one block, take "
            "optim.body_lr"
        )


def no_optimizer(model: VisionModel) -> Optimizer:
    """Make what only clears gradients, where others apply them: it keeps nothing."""
    return Eager([p for p in model.parameters() if p.requires_grad], {"lr": 0.0})


def share_of(config: OptimConfig, model: VisionModel, name: str) -> float:
    """Return the share of the learning rate that the parameter `name` gets.

    The body's last block has `body_lr`, every one before it `layer_decay` times the next one's.
    """
    for number, prefix in enumerate(reversed(model.body)):
        if name.startswith(prefix):
            return config.body_lr * config.layer_decay**number
    return 1.0


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate and weight average of a run of `total` samples in steps of `batch`."""

    config: OptimConfig
    epochs: int
    images: int  # per epoch
    batch: float  # images of an update

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
