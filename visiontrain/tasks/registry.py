"""TASKS: what can be learned, by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.detect import DetectTask

TASKS: dict[str, Callable[[DetectConfig, int], DetectTask]] = {"detect": DetectTask}


def build_task(config: DetectConfig, num_classes: int) -> DetectTask:
    """Make the task `config` names for `num_classes` classes."""
    return TASKS[config.kind](config, num_classes)
