"""Settings of the training modes (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section


class Single(Section):
    """One process, one device: the control run for every other mode."""

    kind: Literal["single"] = "single"


class Group(Section):
    """What all modes of several processes share."""

    processes: int = Field(
        2, ge=1, description="processes on this machine; where it is not set, one for every GPU"
    )
    timeout_s: float = Field(600.0, gt=0, description="seconds a collective may take")
    threads: int | None = Field(
        None, ge=1, description="CPU threads per process; default: cores / processes"
    )


class DDP(Group):
    """Data parallel: every process holds the model and a share of each batch."""

    kind: Literal["ddp"] = "ddp"


class FSDP(Group):
    """Sharded data parallel: parameters, gradients, optimizer and EMA are cut over processes."""

    kind: Literal["fsdp"] = "fsdp"


class Pipeline(Group):
    """Model parallel: every process holds a run of blocks; micro-batches flow through."""

    kind: Literal["pipeline"] = "pipeline"
    schedule: Literal["gpipe", "1f1b"] = Field("gpipe", description="order of the micro-batches")
    cuts: list[str] | None = Field(
        None, description="first block of each stage but the first; default: balanced by cost"
    )


StrategyConfig = Annotated[Single | DDP | FSDP | Pipeline, Field(discriminator="kind")]
