"""Settings of the models (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section

Norm = Literal["batch", "sync", "group", "frozen"]


class Yolo(Section):
    """What the detectors of our own family share."""

    norm: Norm = Field("batch", description="normalisation: batch, sync (GPUs), group or frozen")
    head: Literal["dual", "nms"] = Field(
        "dual", description="dual needs no suppression in use; nms leaves the one-to-one branch out"
    )
    finest: Literal[4, 8] = Field(
        8, description="stride of the finest level; 4 finds smaller objects and costs time"
    )
    backbone: str | None = Field(
        None, description="a timm model in the place of our own stages, such as resnet50"
    )
    pretrained: Literal["installed", "hub", "none"] = Field(
        "installed",
        description="backbone weights: from an installed package, downloaded, or none",
    )


class YoloN(Yolo):
    """The nano detector: 2.0 million parameters, 4.6 GFLOPs at 640 pixels."""

    kind: Literal["yolo_n"] = "yolo_n"


class YoloS(Yolo):
    """The small detector: 7.7 million parameters, 17.6 GFLOPs."""

    kind: Literal["yolo_s"] = "yolo_s"


class YoloM(Yolo):
    """The medium detector: 17.8 million parameters, 58 GFLOPs."""

    kind: Literal["yolo_m"] = "yolo_m"


class YoloL(Yolo):
    """The large detector: 21.8 million parameters, 73 GFLOPs."""

    kind: Literal["yolo_l"] = "yolo_l"


class YoloX(Yolo):
    """The extra large detector: 49.0 million parameters, 165 GFLOPs."""

    kind: Literal["yolo_x"] = "yolo_x"


ModelConfig = Annotated[YoloN | YoloS | YoloM | YoloL | YoloX, Field(discriminator="kind")]
