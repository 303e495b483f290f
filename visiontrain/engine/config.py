"""Settings of the optimizer and of checkpoints (imports no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from visiontrain.core.config import Section


class OptimConfig(Section):
    """How parameters move. Lengths are in epochs or shares; all become functions of samples."""

    kind: Literal["auto", "adamw", "sgd", "muon"] = Field(
        "auto",
        description="auto takes adamw; muon turns matrices by orthogonal steps, the rest is adamw",
    )
    lr: float | None = Field(
        None,
        gt=0,
        description="peak rate; default: 0.002 adamw (0.0001 on torchvision's models), "
        "0.01 sgd, 0.02 muon",
    )
    lr_final: float = Field(0.01, ge=0, le=1, description="last rate as a share of the peak")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="how the rate falls after the warm-up"
    )
    warmup: float = Field(
        3.0, ge=0, description="epochs of linear warm-up, at most a tenth of the run"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum, and beta1 of adamw")
    nesterov: bool = Field(
        True, description="for sgd: momentum that looks ahead; false: that of plain SGD"
    )
    beta2: float = Field(0.999, ge=0, lt=1, description="second beta of adamw, also in muon")
    weight_decay: float = Field(0.0005, ge=0, description="decay of weights; not of norms, biases")
    body_lr: float = Field(
        1.0, gt=0, description="rate of the model's body, the backbone, as a share of the rate"
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="rate of a block of the body as a share of the next one's"
    )
    clip: float = Field(10.0, gt=0, description="largest gradient norm")
    ema_window: float = Field(
        0.05, gt=0, le=1, description="reach of the weight average, as a share of the steps so far"
    )


class SaveConfig(Section):
    """When checkpoints are written, and how many are kept."""

    every_epochs: int = Field(1, ge=1, description="epochs between checkpoints")
    every_steps: int | None = Field(None, ge=1, description="also after so many steps")
    keep: int = Field(3, ge=1, description="checkpoints kept")
    background: bool = Field(
        True, description="write in a thread while training goes on, from a copy in memory"
    )
    sharded: bool = Field(
        False, description="every process writes its own part of a checkpoint (strategy=fsdp)"
    )
