"""Run: the whole typed config, everything a run is made from (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.data.config import AugmentConfig, AugmentSection, DataConfig
from visiontrain.engine.config import OptimConfig, SaveConfig
from visiontrain.loggers.config import LogConfig
from visiontrain.models.config import ModelConfig, Timm, TorchvisionConfig, YoloN
from visiontrain.strategies.config import Single, StrategyConfig
from visiontrain.tasks.config import DetectConfig, TaskConfig


class Scaled(Section):
    """On what speeds are predicted."""

    links: list[str] = Field(
        [], description="predict speeds on links so fast: 10mbit, 100gbit, 50mbit@20ms, nvlink"
    )
    counts: list[int] = Field(
        [8, 64, 512], description="for links: on how many devices, each with its share of the batch"
    )
    per_node: int = Field(
        1, ge=1, description="for links: devices of a machine, which NVLink joins"
    )


class Run(Section):
    """Everything a run is made from."""

    data: DataConfig = DataConfig()
    augment: AugmentSection = AugmentConfig()
    model: ModelConfig = YoloN()
    task: TaskConfig = DetectConfig()
    optim: OptimConfig = OptimConfig()
    strategy: StrategyConfig = Single()
    save: SaveConfig = SaveConfig()
    log: LogConfig = LogConfig()

    epochs: int = Field(100, ge=1, description="passes over the training images")
    batch: int = Field(
        16, ge=-1, description="images per optimizer step, over all processes; -1: what fits"
    )
    accumulate: int = Field(1, ge=1, description="micro-batches each step's batch is cut into")
    recompute: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    imgsz: int = Field(640, ge=32, multiple_of=32, description="side of the square input, pixels")
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="auto: bf16 on GPUs that have it, fp32 elsewhere; GPUs convolve fp32 in TF32",
    )
    device: str = Field("auto", description="auto, cpu, cuda, or GPU numbers such as 0,1")
    ema: bool = Field(True, description="evaluate and save averaged weights")
    freeze: int = Field(0, ge=0, description="leading blocks that do not train")
    patience: int = Field(100, ge=0, description="epochs without a better score; 0 never stops")
    time: float | None = Field(None, gt=0, description="hours after which training ends early")
    val: bool = Field(True, description="evaluate after every epoch; else only after the last")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    weights: str | None = Field(None, description="weights to start from: a file or a run")
    split: Literal["train", "val", "test"] = Field(
        "val", description="split that the verb val scores"
    )
    save_json: bool = Field(
        False, description="also write predictions as JSON, detections in COCO's form"
    )
    resume: bool | Literal["auto"] = Field(
        False, description="go on with the run in `out`; auto: or start it there"
    )
    out: str | None = Field(None, description="run folder; default: project/task/name")
    project: str = Field("runs", description="folder of run folders")
    name: str = Field("train", description="name of the run folder, numbered when taken")


USES: Mapping[str, tuple[str, ...]] = {  # what a verb may be told; the rest would change nothing
    "train": tuple(name for name in Run.model_fields if name != "split"),
    "val": (
        *("data.source", "data.own", "data.val_images", "data.single_cls", "data.workers"),
        *("data.cache", "data.cache_dir", "data.strict", "data.max_pixels", "data.tile"),
        *("data.overlap", "data.shard_cache_gb"),
        *(f"strategy.{name}" for name in ("kind", "processes", "threads", "stages", "offload")),
        *("strategy.data_parallel", "strategy.timeout_s", "strategy.max_restarts"),
        *("task.conf", "task.iou", "task.nms", "task.max_det", "task.flip", "task.shift"),
        *("batch", "imgsz", "precision", "device", "weights", "split", "save_json"),
        *("out", "project", "name", "log.plots"),
    ),
    "check": (
        *("data.source", "data.train_images", "data.val_images", "data.fraction"),
        *("data.cache_dir", "data.max_pixels", "data.shard_cache_gb", "imgsz", "out", "task.kind"),
    ),
    "parity": (
        *("data", "augment", "model", "optim", "strategy", "epochs", "batch", "accumulate"),
        *("task.kind", "task.box", "task.cls", "task.l1", "task.topk", "task.alpha", "task.beta"),
        *("task.smoothing", "task.class_weights"),
        *("imgsz", "precision", "device", "ema", "freeze", "seed", "weights", "recompute"),
    ),
}


MOST_SCORED = 64 * 640**2  # pixels of images that a process scores at a time


def scored_at_once(batch: int, parts: int, side: int) -> int:
    """Return how many images a process scores at a time, the same whatever their number.

    It gets whole batches, of which it trains on a share: that of many GPUs may not fit into one.

    Args:
        batch: images of a training step, over all processes.
        parts: that a process takes of it one after the other.
        side: of an image, pixels.
    """
    return min(-(-batch // max(1, parts)), max(1, MOST_SCORED // side**2))


def foreign(run: Run) -> bool:
    """Tell whether the model brings its own loss, and is one block."""
    return isinstance(run.model, TorchvisionConfig)


def timm(run: Run) -> bool:
    """Tell whether the model is a classifier of timm's."""
    return isinstance(run.model, Timm)
