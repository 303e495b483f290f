"""From a weights file to a model that predicts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from visiontrain.core.errors import CheckpointError
from visiontrain.core.explain import short
from visiontrain.core.interfaces import VisionModel
from visiontrain.core.section import kind_of, sections
from visiontrain.engine.classifier import Classifier
from visiontrain.engine.detector import Detector
from visiontrain.engine.weights import Weights, WeightsMeta, load_weights
from visiontrain.models.config import ModelConfig
from visiontrain.models.registry import build_model
from visiontrain.strategies.devices import devices
from visiontrain.tasks.config import TaskConfig
from visiontrain.tasks.registry import build_task


def load_predictor(
    path: str | Path,
    decoding: Mapping[str, Any],
    *,
    imgsz: int | None = None,
    device: str = "auto",
) -> Detector | Classifier:
    """Read weights and make them ready for use.

    Args:
        path: a weights file, or a run folder: its best weights.
        decoding: keys of the task's config to set, such as `conf` and `max_det`; those of
            another task are left out.
        imgsz: side of the square input; None takes the one trained at.
        device: auto, cpu, cuda, or the number of a GPU.

    Raises:
        CheckpointError: when the file can't be used.
        ConfigError: when there is no such device.
    """
    weights = load_weights(path)
    meta, place = weights.meta, devices(device)[0]
    model = filled(weights, str(path)).to(place).eval()
    described = model_config(weights, str(path))
    # A head without one-to-one scores always needs suppression.
    nms = bool(decoding.get("nms")) or described.suppressed
    config = _task_config(meta, {**decoding, "nms": nms}, str(path))
    task = build_task(config, len(meta.names), described)
    kind = Detector if meta.task == "detect" else Classifier
    return kind(meta.task, model, task, tuple(meta.names), imgsz or meta.imgsz, place)


def _task_config(meta: WeightsMeta, decoding: Mapping[str, Any], where: str) -> TaskConfig:
    section = next(s for s in sections(TaskConfig) if kind_of(s) == meta.task)
    own = {key: value for key, value in decoding.items() if key in section.model_fields}
    try:
        return TypeAdapter(TaskConfig).validate_python(
            {**meta.task_config, **own, "kind": meta.task}
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"][1:]))  # after the kind
        raise CheckpointError(
            f"weights: {where}: task_config.{key}: {first['msg'].lower()}; give weights of this "
            "version of visiontrain"
        ) from error


def filled(weights: Weights, where: str) -> VisionModel:
    """Make the model that `weights` describes, and give it the tensors.

    Raises:
        CheckpointError: when they do not fit exactly; `where` names the file.
    """
    model = build_model(model_config(weights, where), len(weights.meta.names), weights.meta.task)
    try:
        model.load_state_dict(weights.tensors)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"weights: {where} does not fit the model it names ({first}); give another file"
        ) from error
    return model


def model_config(weights: Weights, where: str) -> ModelConfig:
    """Return the model that `weights` names.

    Raises:
        CheckpointError: this version has none such; `where` names the file.
    """
    try:
        return TypeAdapter(ModelConfig).validate_python(weights.meta.model)
    except ValidationError as error:
        raise CheckpointError(
            f"weights: {where} holds a model that this version does not know "
            f"({short(weights.meta.model)}); use the version that wrote it"
        ) from error
