"""The Python side of the verbs: the same keys as on the command line, typed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

import numpy as np
from torch import Tensor, nn

from visiontrain import commands, comparison, planning, prediction
from visiontrain.compare_config import USES as COMPARE_USES
from visiontrain.compare_config import CompareConfig
from visiontrain.core.config import Below, from_keys, read_preset
from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Logger
from visiontrain.core.own import Data, passed, taken_apart
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Batch, Sample
from visiontrain.data import sharding
from visiontrain.data.config import SHARDING_USES, ShardingConfig
from visiontrain.engine.classifier import Classifier
from visiontrain.engine.detector import Detector
from visiontrain.engine.run_folder import RunFolder, home
from visiontrain.engine.weights import load_meta
from visiontrain.plan_config import USES as PLAN_USES
from visiontrain.plan_config import PlanConfig
from visiontrain.planning import Plan
from visiontrain.predict_config import DetectorConfig, PredictConfig
from visiontrain.prediction import Predicted
from visiontrain.prepare import below, folder_of
from visiontrain.recipe import USES, Run
from visiontrain.report.compare import Comparison
from visiontrain.scoring import below_validation
from visiontrain.strategies.environment import is_first

Keys = Mapping[str, Any]  # the keys of a section
OF_MODEL = ("model.kind", "model.own")  # of a model that was passed: what the weights are of
_log = logging.getLogger(__name__).info


class TrainKeys(TypedDict, total=False):
    """The keys of `train` and `val`, aliases included; sections as a main value or a mapping."""

    data: str | Path | Keys | Data
    augment: str | Keys | Callable[[Sample, np.random.Generator], Sample]
    model: str | Keys | nn.Module | Callable[[int], nn.Module]
    loss: Callable[[Any, Batch], Tensor]
    logger: Callable[[Mapping[str, float], int], Any] | Logger
    task: str | Keys
    optim: str | Keys
    strategy: str | Keys
    save: Keys
    log: Keys
    epochs: int
    batch: int
    accumulate: int
    recompute: bool
    imgsz: int
    precision: Literal["auto", "fp64", "fp32", "bf16", "fp16"]
    device: str
    ema: bool
    freeze: int
    patience: int
    time: float | None
    val: bool
    seed: int
    weights: str | Path | None
    split: Literal["train", "val", "test"]
    save_json: bool
    resume: bool | Literal["auto"]
    out: str | Path | None
    project: str | Path
    name: str
    # Aliases that YOLO users know; core/keys.py says where they lead.
    workers: int | Literal["auto"]
    cache: bool | Literal["none", "ram", "disk"]
    fraction: float
    single_cls: bool
    lr0: float | None
    lrf: float
    optimizer: str
    momentum: float
    weight_decay: float
    warmup_epochs: float
    cos_lr: bool
    amp: bool
    conf: float
    iou: float
    max_det: int
    nms: bool
    box: float
    cls: float
    plots: bool
    close_mosaic: int
    mosaic: float
    hsv_h: float
    hsv_s: float
    hsv_v: float
    fliplr: float
    flipud: float
    scale: float
    translate: float
    degrees: float
    shear: float
    mixup: float
    multi_scale: float
    copy_paste: float
    cutmix: float
    erasing: float
    auto_augment: Literal["none", "trivial", "randaugment"]
    label_smoothing: float


class ScaleKeys(TypedDict, total=False):
    """What `plan` and `compare` predict speeds with."""

    links: Sequence[str]
    counts: Sequence[int]
    per_node: int


class CompareKeys(TrainKeys, ScaleKeys, total=False):
    """The keys of `compare`: those of `train`, which modes and settings, and how often."""

    strategies: Sequence[str | Keys]
    runs: Sequence[Keys]
    seeds: Sequence[int]
    budget: Literal["samples", "epochs", "seconds"]
    alone: bool
    check: bool
    check_steps: int


class PlanKeys(TrainKeys, ScaleKeys, total=False):
    """The keys of `plan`: those of `train`, and what to run on."""

    devices: int | None
    memory: float | None
    measure: bool
    step_s: float | None


class ShardKeys(TypedDict, total=False):
    """The keys of `shard`."""

    data: str | Path | Keys
    task: Literal["detect", "classify"] | None
    out: str | Path
    split: Sequence[Literal["train", "val", "test"]]
    shard_size: float
    shuffle: bool
    fraction: float
    single_cls: bool


class LoadKeys(TypedDict, total=False):
    """The keys of `load`: what counts as a detection, and where to compute."""

    model: nn.Module | Callable[[int], nn.Module]
    conf: float
    iou: float
    nms: bool
    max_det: int
    imgsz: int | None
    device: str
    tile: int | None
    overlap: float | None
    max_pixels: int


class PredictKeys(LoadKeys, total=False):
    """The keys of `predict`."""

    weights: str | Path
    source: str | Path
    strategy: str | Keys
    batch: int
    vid_stride: int
    save: bool
    save_txt: bool
    save_json: bool
    out: str | Path | None
    project: str | Path
    name: str


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run that is over, or was stopped by a signal and can go on with `resume=True`."""

    folder: Path
    metrics: Mapping[str, Any]  # as in metrics.json; empty when the run was stopped, or not here
    weights: Path  # the best; the last where none was scored
    config: Run  # whole, with everything that was chosen
    exit_code: int  # 0 complete; 75 or 130 saved after a signal


def train(preset: str | Path | None = None, /, **keys: Unpack[TrainKeys]) -> TrainedRun:
    """Train a model.

    Args:
        preset: a preset's name or a YAML file, such as a run's config.yaml.
        keys: as on the command line, see cfg/README.md. A section takes its main value or a
            mapping: `strategy="ddp"`, `strategy={"kind": "ddp", "processes": 2}`, or, dotted,
            `**{"strategy.processes": 2}`.

    Raises:
        VisiontrainError: with one line that says where, what it got, and what would do.
    """
    whole = taken_apart(keys)
    objects = passed(whole)
    run, exit_code = commands.train(lambda: _run("train", preset, whole, below), objects)
    folder = folder_of(run)
    return _result(run, folder.best if folder.best.is_file() else folder.last, exit_code)


def val(preset: str | Path | None = None, /, **keys: Unpack[TrainKeys]) -> TrainedRun:
    """Score `weights` on `split` of `data`; keys as for `train`.

    Raises:
        VisiontrainError: with one line that says where, what it got, and what would do.
    """
    whole = taken_apart(keys)
    objects = passed(whole)
    whole = {key: value for key, value in whole.items() if key not in OF_MODEL}  # weights say it
    made = partial(_run, "val", preset, whole, below_validation)
    run, exit_code = commands.validate(made, objects)
    weights = home(run.weights or "")
    return _result(run, RunFolder(weights).best if weights.is_dir() else weights, exit_code)


def compare(preset: str | Path | None = None, /, **keys: Unpack[CompareKeys]) -> Comparison:
    """Train in each of `strategies`, from the same weights and with the same samples.

    Args:
        preset: as for `train`, or the compare.yaml of another comparison.
        keys: as for `train`. `strategies` lists modes, such as `["single", "ddp"]`; one with keys
            of its own is a mapping or text: `{"kind": "ddp", "processes": 4}`, `"ddp:threads=1"`.
            `runs` lists runs that differ in any key: `{"batch": 32, "optim.lr": 0.002}`.
            `links` also predicts speeds on more devices (`Comparison.predicted`).

    Returns:
        A row per mode, also for one that failed, with means over `seeds` and each run below; as
        text, the table and a verdict. Its folder holds report.html.

    Raises:
        VisiontrainError: before anything starts, with one line, when a run cannot be as asked.
    """
    base = None if preset is None else read_preset(CompareConfig, str(preset), shipped("cfg"))
    given = keys.get("runs")
    for entry in given if isinstance(given, list | tuple) else ():
        objects = passed(taken_apart(entry)) if isinstance(entry, Mapping) else {}
        if objects:
            raise ConfigError(
                f"runs: {next(iter(objects))} is an object, and one for all runs can be passed "
                "alone; compare the results of several train() instead"
            )
    config = from_keys(CompareConfig, taken_apart(keys), base, COMPARE_USES, comparison.below)
    return comparison.compare(config, _log)


def plan(preset: str | Path | None = None, /, **keys: Unpack[PlanKeys]) -> Plan:
    """Work out what each mode would need: memory per process, waiting, bytes that travel.

    Args:
        preset: as for `train`.
        keys: as for `train`. `devices` says how many there are, `memory` how many GiB each has;
            with `measure` a few steps are trained in each mode, and weighed. `links` also
            predicts speeds on more devices (`Plan.speeds`), from a step here or of `step_s`.

    Raises:
        VisiontrainError: with one line, when the training cannot be as asked.
    """
    base = None if preset is None else read_preset(PlanConfig, str(preset), shipped("cfg"))
    return planning.plan(from_keys(PlanConfig, taken_apart(keys), base, PLAN_USES, below))


def shard(**keys: Unpack[ShardKeys]) -> sharding.Sharded:
    """Write a data set as tars with an index, for what outgrows a folder; keys as for `train`.

    Returns:
        What was written; its `folder` is what to give as `data`.

    Raises:
        VisiontrainError: with one line that says where, what it got, and what would do.
    """
    return sharding.shard(from_keys(ShardingConfig, keys, None, SHARDING_USES))


def predict(**keys: Unpack[PredictKeys]) -> Predicted:
    """Find objects in the files of `source`, write pictures and predictions.json.

    To get detections of pictures in memory, see `load`.

    Raises:
        KeyboardInterrupt: at Ctrl-C, when what was found before is written.
        VisiontrainError: with one line that says where, what it got, and what would do.
    """
    whole = taken_apart(keys)
    rest = {key: value for key, value in whole.items() if key not in OF_MODEL}
    return commands.predict(from_keys(PredictConfig, rest), _log, passed(whole))


def load(weights: str | Path, **keys: Unpack[LoadKeys]) -> Detector | Classifier:
    """Read a weights file, or the best weights of a run folder, ready to predict.

    Raises:
        VisiontrainError: with one line that says where, what it got, and what would do.
    """
    whole = taken_apart(keys)
    rest = {key: value for key, value in whole.items() if key not in OF_MODEL}
    config = from_keys(DetectorConfig, {**rest, "weights": weights})
    objects = passed(whole)
    prediction.check_decoding(config, load_meta(config.weights), objects)
    return prediction.load(config, objects)


def _run(verb: str, preset: str | Path | None, keys: Keys, below: Below | None = None) -> Run:
    base = None if preset is None else read_preset(Run, str(preset), shipped("cfg"))
    return from_keys(Run, keys, base, USES[verb], below)


def _result(run: Run, weights: Path, exit_code: int) -> TrainedRun:
    folder = folder_of(run)
    metrics: dict[str, Any] = {}
    if not exit_code and (is_first() or folder.metrics.is_file()):
        metrics = json.loads(folder.metrics.read_text(encoding="utf-8"))
    return TrainedRun(folder.path, metrics, weights, run, exit_code)
