"""Train and use detectors and classifiers: `import visiontrain as vt; vt.train(data="digits")`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontrain.api import TrainedRun, compare, load, predict, shard, train, val
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
    from visiontrain.core.types import ClassScores, Detections
    from visiontrain.data.sharding import Sharded
    from visiontrain.engine.classifier import Classifier
    from visiontrain.engine.detector import Detector
    from visiontrain.prediction import Predicted
    from visiontrain.report.compare import Comparison

__version__ = "0.1.0"

# Where each name lives. Importing the package imports none of them: torch takes seconds.
_HOMES = {
    "CheckpointError": "core.errors",
    "ClassScores": "core.types",
    "Classifier": "engine.classifier",
    "Comparison": "report.compare",
    "ConfigError": "core.errors",
    "DataError": "core.errors",
    "Detections": "core.types",
    "Detector": "engine.detector",
    "DivergedError": "core.errors",
    "FetchError": "core.errors",
    "Sharded": "data.sharding",
    "OutOfMemoryError": "core.errors",
    "Predicted": "prediction",
    "RankError": "core.errors",
    "StorageError": "core.errors",
    "TrainedRun": "api",
    "VisiontrainError": "core.errors",
    "compare": "api",
    "load": "api",
    "predict": "api",
    "shard": "api",
    "train": "api",
    "val": "api",
}

__all__ = [
    "CheckpointError",
    "ClassScores",
    "Classifier",
    "Comparison",
    "ConfigError",
    "DataError",
    "Detections",
    "Detector",
    "DivergedError",
    "FetchError",
    "OutOfMemoryError",
    "Predicted",
    "RankError",
    "Sharded",
    "StorageError",
    "TrainedRun",
    "VisiontrainError",
    "__version__",
    "compare",
    "load",
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
