"""MODELS: every network by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.interfaces import VisionModel
from visiontrain.models.config import ModelConfig, Norm
from visiontrain.models.yolo import SIZES, Yolo

MODELS: dict[str, Callable[[int, Norm], VisionModel]] = {
    "yolo_n": lambda classes, norm: Yolo(SIZES["yolo_n"], classes, norm=norm),
    "yolo_s": lambda classes, norm: Yolo(SIZES["yolo_s"], classes, norm=norm),
}


def build_model(config: ModelConfig, num_classes: int) -> VisionModel:
    """Make the network `config` names. Weights come from torch's generator: seed it first."""
    return MODELS[config.kind](num_classes, config.norm)
