"""Settings of `visiontrain predict` (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.strategies.config import Group, Single


class DetectorConfig(Section):
    """Which weights, and what counts as a detection."""

    weights: str = Field(description="weights file, or a run folder (its best weights)")
    conf: float = Field(0.25, ge=0, le=1, description="drop detections below this score")
    nms: bool = Field(False, description="suppress overlaps; the one-to-one head needs none")
    iou: float = Field(0.7, ge=0, le=1, description="overlap above which nms=true merges")
    max_det: int = Field(300, ge=1, description="detections kept per image")
    imgsz: int | None = Field(
        None, ge=32, multiple_of=32, description="side of the square input; default: as trained"
    )
    device: str = Field("auto", description="auto, cpu, cuda, or a GPU number")
    tile: int | None = Field(
        None,
        ge=0,
        description="cut pictures into squares of so many pixels; default: as trained; 0: whole",
    )
    overlap: float | None = Field(
        None,
        ge=0,
        le=0.9,
        description="overlap of neighbouring tiles, share of the side; default: as trained, or 0.2",
    )
    max_pixels: int = Field(
        64_000_000, ge=1, description="refuse larger images from their header, before decoding"
    )


class Spread(Group):
    """Data parallel: every process takes whole batches of pictures, and whole videos."""

    kind: Literal["ddp"] = "ddp"


class Stages(Group):
    """Model parallel: every process holds a run of blocks; batches go through all."""

    kind: Literal["pipeline"] = "pipeline"
    stages: Literal["auto"] | list[str] = Field(
        "auto", description="first block of each stage but the first; auto: equally many operations"
    )
    data_parallel: int = Field(
        1, ge=1, description="pipelines side by side, each on its share of the pictures"
    )


class PredictConfig(DetectorConfig):
    """A detector, on what to use it, and what to write."""

    strategy: Annotated[Single | Spread | Stages, Field(discriminator="kind")] = Single()
    device: str = Field("auto", description="auto, cpu, cuda, or GPU numbers such as 0,1")
    source: str = Field(
        description="picture, video, folder or glob; digits or tiny: 8 of its test scenes"
    )
    batch: int = Field(8, ge=1, description="images per forward pass")
    vid_stride: int = Field(1, ge=1, description="videos: take every n-th frame")
    save: bool = Field(True, description="write pictures and videos with boxes drawn")
    save_txt: bool = Field(False, description="also write YOLO label files, with scores")
    save_json: bool = Field(False, description="also write detections as COCO results JSON")
    out: str | None = Field(None, description="output folder; default: project/task/name")
    project: str = Field("runs", description="folder of run folders")
    name: str = Field("predict", description="name of the output folder, numbered when taken")
