"""TASKS: what can be learned, by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.interfaces import Task
from visiontrain.models.body import strides_from
from visiontrain.models.config import ModelConfig, TorchvisionConfig
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.detect import DetectTask
from visiontrain.tasks.torchvision_detect import TorchvisionTask


def detect(config: DetectConfig, classes: int, model: ModelConfig) -> Task:
    """Make what fits the outputs of the model's family."""
    if isinstance(model, TorchvisionConfig):
        return TorchvisionTask(config, model.kind)
    strides, dual = strides_from(model.finest), model.head == "dual"
    return DetectTask(config, classes, strides=strides, dual=dual)


TASKS: dict[str, Callable[[DetectConfig, int, ModelConfig], Task]] = {"detect": detect}


def build_task(config: DetectConfig, num_classes: int, model: ModelConfig) -> Task:
    """Make the task `config` names, for the outputs of `model`."""
    return TASKS[config.kind](config, num_classes, model)
