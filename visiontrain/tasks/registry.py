"""TASKS: what can be learned, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Task
from visiontrain.data.table import Table
from visiontrain.models.body import strides_from
from visiontrain.models.config import ModelConfig, OwnModel, TorchvisionConfig, YoloConfig
from visiontrain.tasks.classify import ClassifyTask
from visiontrain.tasks.config import ClassifyConfig, DetectConfig, TaskConfig
from visiontrain.tasks.detect import DetectTask
from visiontrain.tasks.own_loss import OwnLossTask
from visiontrain.tasks.torchvision_detect import TorchvisionTask


def detect(
    config: DetectConfig, classes: int, model: YoloConfig | TorchvisionConfig | OwnModel
) -> Task:
    """Make what fits the outputs of the model's family."""
    if isinstance(model, TorchvisionConfig):
        return TorchvisionTask(config, model.kind)
    strides, dual = strides_from(model.finest), model.head == "dual"
    return DetectTask(config, classes, strides=strides, dual=dual)


def classify(config: ClassifyConfig, classes: int, model: ModelConfig) -> Task:
    """Make what fits logits."""
    del model  # all classifiers return the same
    if config.class_weights is not None and len(config.class_weights) != classes:
        raise ConfigError(
            f"task.class_weights: {len(config.class_weights)} of them for {classes} classes; give "
            "one for each, in the order of the names"
        )
    return ClassifyTask(config, classes)


TASKS: dict[str, Callable[[Any, int, Any], Task]] = {"detect": detect, "classify": classify}


def build_task(config: TaskConfig, num_classes: int, model: ModelConfig) -> Task:
    """Make the task `config` names, for the outputs of `model`."""
    task = TASKS[config.kind](config, num_classes, model)
    if config.loss is None or config.loss.value is None:  # predictions need no loss
        return task
    return OwnLossTask(task, config.loss.value)


def as_task(table: Table, config: TaskConfig) -> Table:
    """Return a table as the task takes it: with one class an image, or any number.

    Raises:
        ConfigError: one is asked for, where images have several.
    """
    several = isinstance(config, ClassifyConfig) and config.several
    if table.several and not several:
        raise ConfigError(
            "task.several: false, but images of the data set have several classes; leave it out "
            "in a training; weights of one class for each image cannot be scored on these"
        )
    return replace(table, several=several)
