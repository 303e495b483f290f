"""Settings of the tasks: how predictions are compared with the truth (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from visiontrain.core.config import Section
from visiontrain.core.own import Own


class DetectConfig(Section):
    """Detection: assignment, loss gains, and what counts as a prediction."""

    kind: Literal["detect"] = "detect"
    box: float = Field(7.5, ge=0, description="gain of the 1 - CIoU term")
    cls: float = Field(0.5, ge=0, description="gain of the classification term")
    l1: float = Field(1.0, ge=0, description="gain of the L1 term on distances in stride units")
    topk: int = Field(10, ge=1, description="one-to-many: anchors per box")
    alpha: float = Field(0.5, ge=0, description="assignment: exponent of the class score")
    beta: float = Field(6.0, ge=0, description="assignment: exponent of the overlap")
    conf: float = Field(0.001, ge=0, le=1, description="drop detections below this score")
    iou: float = Field(0.7, ge=0, le=1, description="overlap above which nms=true merges")
    nms: bool = Field(False, description="suppress overlaps; the one-to-one head needs none")
    max_det: int = Field(300, ge=1, description="detections kept per image")
    loss: Own | None = Field(
        None, description="a loss of yours in the place of ours, passed in Python: train(loss=...)"
    )


class ClassifyConfig(Section):
    """Classification of whole images: the loss, and how predictions are made."""

    kind: Literal["classify"] = "classify"
    smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of each target that all classes get alike"
    )
    class_weights: list[float] | None = Field(
        None, description="how much a class counts in the loss, in the order of the names"
    )
    several: bool = Field(
        False, description="an image may have any number of classes; the data say so themselves"
    )
    flip: bool = Field(False, description="score pictures also mirrored, and take the mean")
    shift: int = Field(
        0,
        ge=0,
        le=8,
        description="pixels; score pictures also shifted so far, up-left and down-right",
    )
    loss: Own | None = Field(
        None, description="a loss of yours in the place of ours, passed in Python: train(loss=...)"
    )

    @field_validator("class_weights")
    @classmethod
    def _weighs(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and (min(value, default=0) < 0 or not any(value)):
            raise PydanticCustomError("no_weights", "give numbers from 0 on, not all of them 0")
        return value


TaskConfig = Annotated[DetectConfig | ClassifyConfig, Field(discriminator="kind")]
