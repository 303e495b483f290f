"""Detector: a trained model, ready for use on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from visiontrain.core.errors import CheckpointError, DataError
from visiontrain.core.explain import short
from visiontrain.core.interfaces import Task, VisionModel
from visiontrain.core.types import Batch, Detections
from visiontrain.data.images import decode, read_bytes
from visiontrain.data.letterbox import letterbox
from visiontrain.engine.weights import Weights, WeightsMeta, load_weights
from visiontrain.models.config import ModelConfig
from visiontrain.models.registry import build_model
from visiontrain.strategies.devices import devices
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.registry import build_task

Pixels = NDArray[np.uint8]  # (H, W, 3) RGB
Picture = str | Path | Pixels
MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class Detector:
    """A model with its task and class names, on one device."""

    kind: str  # of the task, such as "detect"
    model: VisionModel
    task: Task
    names: tuple[str, ...]  # a detection's class indexes this
    imgsz: int  # side of the square input, pixels
    device: torch.device

    def predict(self, images: Picture | Sequence[Picture], *, batch: int = 8) -> list[Detections]:
        """Find objects, `batch` pictures at a time.

        Args:
            images: a path, an RGB array (H, W, 3) uint8, or a sequence of either.
            batch: pictures per forward pass.

        Returns:
            One entry per picture, on the CPU, boxes in the picture's own pixels.

        Raises:
            DataError: when a file can't be read or an array has another shape or type.
        """
        one = isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4)
        pictures: Sequence[Picture] = [images] if one else images  # pyrefly: ignore
        found: list[Detections] = []
        for start in range(0, len(pictures), batch):
            part = pictures[start : start + batch]
            found += self.detect([_pixels(p, start + i) for i, p in enumerate(part)])
        return found

    @torch.inference_mode()
    def detect(self, images: Sequence[Pixels]) -> list[Detections]:
        """Find objects in `images` by one forward pass."""
        batch = self._batch(images).to(self.device)
        return [self._named(found) for found in self.task.decode(self.model(batch.images), batch)]

    def _batch(self, images: Sequence[Pixels]) -> Batch:
        boxed = [letterbox(image, self.imgsz) for image in images]
        squares = np.stack([square for square, _ in boxed])  # (B, S, S, 3)
        count = len(images)
        return Batch(
            images=torch.from_numpy(squares).permute(0, 3, 1, 2),
            targets=torch.full((count, 0, 6), -1.0),
            ids=torch.arange(count),
            frame=torch.from_numpy(np.stack([frame for _, frame in boxed])),
            valid=torch.ones(count),
        )

    def _named(self, found: Detections) -> Detections:
        classes = found.classes.cpu()
        names = tuple(self.names[k] for k in classes.tolist())
        return replace(
            found, boxes=found.boxes.cpu(), scores=found.scores.cpu(), classes=classes, names=names
        )


def load_detector(
    path: str | Path,
    decoding: Mapping[str, Any],
    *,
    imgsz: int | None = None,
    device: str = "auto",
) -> Detector:
    """Read weights and make them ready for use.

    Args:
        path: a weights file, or a run folder: its best weights.
        decoding: keys of the task's config to set, such as `conf` and `max_det`.
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
    return Detector(meta.task, model, task, tuple(meta.names), imgsz or meta.imgsz, place)


def _task_config(meta: WeightsMeta, decoding: Mapping[str, Any], where: str) -> DetectConfig:
    try:
        return DetectConfig.model_validate({**meta.task_config, **decoding})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(
            f"weights: {where}: task_config.{key}: {first['msg'].lower()}; give weights of this "
            "version of visiontrain"
        ) from error


def filled(weights: Weights, where: str) -> VisionModel:
    """Make the model that `weights` describes, and give it the tensors.

    Raises:
        CheckpointError: when they do not fit exactly; `where` names the file.
    """
    model = build_model(model_config(weights, where), len(weights.meta.names))
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


def read_pixels(path: Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Read a picture as (H, W, 3) RGB; DataError when that fails."""
    return decode(read_bytes(str(path)), str(path), max_pixels)


def _pixels(picture: Picture, number: int) -> Pixels:
    if isinstance(picture, str | Path):
        return read_pixels(Path(picture))
    good = picture.ndim == 3 and picture.shape[2] == 3 and picture.dtype == np.uint8
    if not good or not picture.size:
        got = f"an array {picture.shape} of {picture.dtype}"
        raise DataError(f"images[{number}]: {got}; give RGB (H, W, 3) of uint8, no side empty")
    return picture
