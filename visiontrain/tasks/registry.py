"""TASKS: what can be learned, by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.models.body import strides_from
from visiontrain.models.config import ModelConfig
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.detect import DetectTask

TASKS: dict[str, Callable[[DetectConfig, int, ModelConfig], DetectTask]] = {
    "detect": lambda config, classes, model: DetectTask(
        config,
        classes,
        strides=strides_from(model.finest),
        dual=model.head == "dual",
    ),
}


def build_task(config: DetectConfig, num_classes: int, model: ModelConfig) -> DetectTask:
    """Make the task `config` names, for the outputs of `model`."""
    return TASKS[config.kind](config, num_classes, model)
