"""Settings of the models (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section

Norm = Literal["batch", "sync", "group", "frozen"]


class YoloN(Section):
    """The small anchor-free detector: dual head, no NMS, about 2.5 million parameters."""

    kind: Literal["yolo_n"] = "yolo_n"
    norm: Norm = Field("batch", description="normalisation: batch, sync (GPUs), group or frozen")


class YoloS(Section):
    """The same detector, twice as wide."""

    kind: Literal["yolo_s"] = "yolo_s"
    norm: Norm = Field("batch", description="normalisation: batch, sync (GPUs), group or frozen")


ModelConfig = Annotated[YoloN | YoloS, Field(discriminator="kind")]
