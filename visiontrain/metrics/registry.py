"""EVALUATORS: how each kind of task is scored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visiontrain.core.interfaces import Evaluator
from visiontrain.metrics.classification import build_evaluator
from visiontrain.metrics.detection import DetectionEvaluator

EVALUATORS: dict[str, Callable[[Any], Evaluator]] = {
    "detect": DetectionEvaluator,
    "classify": build_evaluator,
}
