"""What must not change by accident; `python tests/golden/measure.py` writes it anew.

Look at the difference before you commit it: a checkpoint of yesterday, a config of a user or a
published figure may rest on what was there.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visiontrain.core.types import Place
from visiontrain.data.config import AugmentConfig
from visiontrain.data.dataset import TrainSet
from visiontrain.data.digits import Recipe, compose
from visiontrain.data.loader import Plan, train_steps
from visiontrain.engine.config import OptimConfig
from visiontrain.engine.learner import Learner, start_average
from visiontrain.engine.optim import Schedule, build_optimizer
from visiontrain.engine.step import train_step
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.recipe import Run
from visiontrain.strategies.config import Single
from visiontrain.strategies.registry import build_strategy
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.detect import DetectTask

GOLDEN = Path(__file__).with_name("golden.json")
SIDE, IMAGES, EPOCHS = 96, 12, 4


def measure() -> dict[str, Any]:
    """Measure everything anew."""
    return {
        "defaults": Run().model_dump(mode="json"),
        "tensors": {name: list(t.shape) for name, t in _model().state_dict().items()},
        "scenes": _scenes(),
        "samples": _samples(),
        "terms": _terms(),
    }


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(YoloN(), 10)


def _scenes() -> list[Any]:
    """Describe the first embedded scenes of each split."""
    tables = [compose(Recipe(), split, 2) for split in ("train", "val", "test")]
    return [
        {
            "classes": table.classes.tolist(),
            "boxes": table.boxes.tolist(),
            "colours": [_colours(table.images.read(row)) for row in range(2)],
        }
        for table in tables
    ]


def _data() -> TrainSet:
    table = compose(Recipe(canvas=SIDE, digits=(1, 4), heights=(20, 44)), "train", IMAGES)
    return TrainSet(table, SIDE, AugmentConfig(), seed=0, epochs=EPOCHS)


def _samples() -> list[Any]:
    """Describe augmented samples, with mosaic and without."""
    data = _data()
    chosen = [data[epoch, row] for epoch in (0, EPOCHS - 1) for row in range(3)]
    return [
        {"targets": np.round(sample.targets, 2).tolist(), "colours": _colours(sample.image)}
        for sample in chosen
    ]


def _terms() -> list[dict[str, float]]:
    """Train a few steps in fp64."""
    model = _model()
    strategy = build_strategy(Single(), Place(torch.device("cpu")), "fp64")
    strategy.setup(model)  # pyrefly: ignore
    optim = OptimConfig()
    learner = Learner(
        strategy=strategy,
        task=DetectTask(DetectConfig(), 10),
        model=model,  # pyrefly: ignore
        optimizer=build_optimizer(optim, model),
        schedule=Schedule(optim, EPOCHS, IMAGES, 4),
        clip=optim.clip,
        seed=0,
        ema=start_average(model, strategy.precision.weights),
    )
    steps = islice(train_steps(_data(), Plan(4, EPOCHS, 0), 0), 4)
    results = [train_step(learner, step.micro_batches, step.images) for step in steps]
    return [
        {"norm": r.grad_norm.item()} | {name: value.item() for name, value in r.terms.items()}
        for r in results
    ]


def _colours(image: np.ndarray) -> list[float]:
    return np.round(image.mean(axis=(0, 1)), 2).tolist()


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(measure(), indent=1) + "\n")
