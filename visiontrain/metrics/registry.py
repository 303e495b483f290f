"""EVALUATORS: how each kind of task is scored."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.interfaces import Evaluator
from visiontrain.metrics.detection import DetectionEvaluator
from visiontrain.metrics.matching import Labels

EVALUATORS: dict[str, Callable[[Labels], Evaluator]] = {"detect": DetectionEvaluator}
