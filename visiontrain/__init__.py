"""Train and use detectors and classifiers: `import visiontrain as vt; vt.train(data="digits")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontrain.api import TrainedRun, compare, load, plan, predict, shard, train, val
    from visiontrain.core.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        FetchError,
        OutOfMemoryError,
        RankError,
        StorageError,
        VisiontrainError,
    )
    from visiontrain.core.interfaces import Logger, VisionModel
    from visiontrain.core.own import Data
    from visiontrain.core.types import Batch, ClassScores, Detections, Sample
    from visiontrain.data.own import TorchData
    from visiontrain.data.sharding import Sharded
    from visiontrain.engine.classifier import Classifier
    from visiontrain.engine.detector import Detector
    from visiontrain.planning import Plan
    from visiontrain.prediction import Predicted
    from visiontrain.report.compare import Comparison

__version__ = "0.1.0"

# Where each name lives. Importing the package imports none of them: torch takes seconds.
_HOMES = {
    "Batch": "core.types",
    "CheckpointError": "core.errors",
    "ClassScores": "core.types",
    "Classifier": "engine.classifier",
    "Comparison": "report.compare",
    "ConfigError": "core.errors",
    "Data": "core.own",
    "DataError": "core.errors",
    "Detections": "core.types",
    "Detector": "engine.detector",
    "DivergedError": "core.errors",
    "FetchError": "core.errors",
    "Logger": "core.interfaces",
    "OutOfMemoryError": "core.errors",
    "Plan": "planning",
    "Predicted": "prediction",
    "RankError": "core.errors",
    "Sample": "core.types",
    "Sharded": "data.sharding",
    "StorageError": "core.errors",
    "TorchData": "data.own",
    "TrainedRun": "api",
    "VisionModel": "core.interfaces",
    "VisiontrainError": "core.errors",
    "compare": "api",
    "load": "api",
    "plan": "api",
    "predict": "api",
    "shard": "api",
    "train": "api",
    "val": "api",
}

__all__ = [
    "Batch",
    "CheckpointError",
    "ClassScores",
    "Classifier",
    "Comparison",
    "ConfigError",
    "Data",
    "DataError",
    "Detections",
    "Detector",
    "DivergedError",
    "FetchError",
    "Logger",
    "OutOfMemoryError",
    "Plan",
    "Predicted",
    "RankError",
    "Sample",
    "Sharded",
    "StorageError",
    "TorchData",
    "TrainedRun",
    "VisionModel",
    "VisiontrainError",
    "__version__",
    "compare",
    "load",
    "plan",
    "predict",
    "shard",
    "train",
    "val",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
