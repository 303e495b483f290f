"""Settings of the loggers (imports no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.core.own import Own


class LogConfig(Section):
    """Where numbers go beside results.csv, which is always written."""

    to: list[Literal["console", "tensorboard", "wandb"]] = Field(
        ["console"], description="loggers beside results.csv"
    )
    every: int = Field(
        10, ge=1, description="steps between console updates; loggers get a row per epoch"
    )
    plots: bool = Field(True, description="draw plots and report.html")
    wandb_project: str = Field("visiontrain", description="wandb: project")
    wandb_mode: Literal["auto", "offline", "online", "disabled"] = Field(
        "auto", description="wandb: auto is online only when WANDB_API_KEY is set"
    )
    own: Own | None = Field(
        None, description="a logger of yours, passed in Python: train(logger=...)"
    )
