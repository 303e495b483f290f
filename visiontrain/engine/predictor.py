"""From a weights file to a model that predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visiontrain.core.errors import CheckpointError, ConfigError
from visiontrain.core.explain import short
from visiontrain.core.interfaces import VisionModel
from visiontrain.core.own import refuse_missing, with_objects
from visiontrain.core.section import kind_of, sections
from visiontrain.engine.classifier import Classifier
from visiontrain.engine.detector import Detector
from visiontrain.engine.evaluate import whole
from visiontrain.engine.pictures import MAX_PIXELS
from visiontrain.engine.weights import SMALLEST, Weights, WeightsMeta, load_weights
from visiontrain.models.config import ModelConfig, OwnModel
from visiontrain.models.registry import build_model, check_input
from visiontrain.ops.tiles import Tiling
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.devices import devices
from visiontrain.tasks.config import DetectConfig, TaskConfig
from visiontrain.tasks.registry import build_task

OVERLAP = 0.2  # of tiles, share of the side


def load_predictor(  # noqa: PLR0913 - what a user may say of it
    path: str | Path,
    decoding: Mapping[str, Any],
    *,
    imgsz: int | None = None,
    device: str = "auto",
    model: Any = None,
    tile: int | None = None,
    overlap: float | None = None,
    max_pixels: int = MAX_PIXELS,
    strategy: Strategy | None = None,
) -> Detector | Classifier:
    """Read weights and make them ready for use.

    Args:
        path: a weights file, or a run folder: its best weights.
        decoding: keys of the task's config to set, such as `conf` and `max_det`; those of
            another task are left out.
        imgsz: side of the square input; None takes the one trained at.
        device: auto, cpu, cuda, or the number of a GPU.
        model: the user's own, where the weights are of one.
        tile: side of the tiles that pictures are cut into, pixels; None as trained, 0 for none.
        overlap: of tiles, share of the side; None as trained.
        max_pixels: larger files are refused from their header.
        strategy: places the model, and keeps here what this process is to hold; None: `device`
            takes all of it.

    Raises:
        CheckpointError: when the file can't be used.
        ConfigError: when there is no such device, or the user's model is missing.
    """
    weights = load_weights(path)
    meta, place = weights.meta, devices(device)[0]
    if strategy is None and "," in device:
        raise ConfigError(f"device: {device}; one model is loaded onto one device, so name one")
    described = model_config(meta, str(path), model)
    if imgsz is not None and imgsz != meta.imgsz:
        check_input(described, imgsz, meta.task)
    net = filled(weights, str(path), model).eval()
    if strategy is None:
        net.to(place)
    else:
        strategy.setup(net)
    forward = whole if strategy is None else strategy.forward
    # A head without one-to-one scores always needs suppression.
    nms = bool(decoding.get("nms")) or described.suppressed
    config = _task_config(meta, {**decoding, "nms": nms}, str(path))
    task = build_task(config, len(meta.names), described)
    names, side = tuple(meta.names), imgsz or meta.imgsz
    tiling = tiling_of(meta, tile, overlap)
    if meta.task == "detect":
        most = config.max_det if isinstance(config, DetectConfig) else 0
        parts = (meta.task, net, task, names, side, place, tiling, most)
        return Detector(*parts, max_pixels=max_pixels, forward=forward)
    return Classifier(meta.task, net, task, names, side, place, max_pixels, forward)


def tiling_of(meta: WeightsMeta, tile: int | None, overlap: float | None) -> Tiling | None:
    """Return how pictures are cut: as asked, else as they were in training.

    Raises:
        ConfigError: an overlap, or tiles of a classifier, where nothing is cut.
    """
    trained = None if meta.tile is None else Tiling(*meta.tile)
    side = tile if tile is not None else trained.side if trained else 0
    if 0 < side < SMALLEST:
        raise ConfigError(f"tile: {side}; take {SMALLEST} or more, or 0 for whole pictures")
    if tile and meta.task != "detect":
        raise ConfigError(f"tile: {tile}; weights that classify whole images, leave it out")
    if not side:
        if overlap is not None:
            raise ConfigError(f"overlap: {overlap}; it changes nothing here, add tile=640")
        return None
    if overlap is None and trained is not None and side == trained.side:
        return trained
    return Tiling.of(side, OVERLAP if overlap is None else overlap)


def _task_config(meta: WeightsMeta, decoding: Mapping[str, Any], where: str) -> TaskConfig:
    section = next(s for s in sections(TaskConfig) if kind_of(s) == meta.task)
    own = {key: value for key, value in decoding.items() if key in section.model_fields}
    try:
        return TypeAdapter(TaskConfig).validate_python(
            {**meta.task_config, **own, "kind": meta.task, "loss": None}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"][1:]))  # after the kind
        raise CheckpointError(
            f"weights: {where}: task_config.{key}: {first['msg'].lower()}; give weights of this "
            "version of visiontrain"
        ) from error


class UnsyncedNorm(_BatchNorm):
    """A synchronised norm in use, which is a plain one of any shape; torch's wants a GPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        del input


def filled(weights: Weights, where: str, own: Any = None) -> VisionModel:
    """Make the model that `weights` describes, and give it the tensors.

    Args:
        weights: the file's content.
        where: the file's name, for errors.
        own: the user's own model, where the weights are of one.

    Raises:
        CheckpointError: when they do not fit exactly.
        ConfigError: the user's model is missing.
    """
    described = model_config(weights.meta, where, own)
    model = build_model(described, len(weights.meta.names), weights.meta.task)
    try:
        model.load_state_dict(weights.tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"weights: {where} does not fit the model it names ({first}); give another file"
        ) from error
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = UnsyncedNorm  # pyrefly: ignore
    return model


def model_config(meta: WeightsMeta, where: str, own: Any = None) -> ModelConfig:
    """Return the model that weights name; arguments as for `filled`.

    Raises:
        CheckpointError: this version has none such.
        ConfigError: the user's model is missing.
    """
    try:
        found: ModelConfig = TypeAdapter(ModelConfig).validate_python(meta.model)
    except ValidationError as error:
        raise CheckpointError(
            f"weights: {where} holds a model that this version does not know "
            f"({short(meta.model)}); use the version that wrote it"
        ) from error
    if own is not None and not isinstance(found, OwnModel):
        raise ConfigError(f"model: {where} holds {found.kind}, no model of yours; leave it out")
    found = with_objects(found, {} if own is None else {"own": own})
    refuse_missing(found, "visiontrain.load(WEIGHTS, {})", "model.")
    return found
