"""What makes samples of a table, for each task."""

from __future__ import annotations

from collections.abc import Mapping

from visiontrain.data.class_dataset import LabelledEval, LabelledTraining
from visiontrain.data.config import AugmentSection
from visiontrain.data.dataset import EvalSet, TrainSet
from visiontrain.data.loader import Scoring, Training
from visiontrain.data.order import Order
from visiontrain.data.table import Table
from visiontrain.data.tiles import TiledEval
from visiontrain.ops.tiles import Tiling

TRAINING: Mapping[str, type[TrainSet | LabelledTraining]] = {
    "detect": TrainSet,
    "classify": LabelledTraining,
}
SCORING: Mapping[str, type[EvalSet | LabelledEval]] = {
    "detect": EvalSet,
    "classify": LabelledEval,
}


def training_set(
    table: Table, imgsz: int, augment: AugmentSection, *, seed: int, epochs: int, order: Order
) -> Training:
    """Return what a run trains on: augmented samples of `imgsz` pixels."""
    return TRAINING[table.task](table, imgsz, augment, seed=seed, epochs=epochs, order=order)


def scoring_set(table: Table, imgsz: int, tiling: Tiling | None = None, most: int = 300) -> Scoring:
    """Return what is scored: every image once, or every tile of it; nothing random.

    Args:
        table: the truth.
        imgsz: side of what the model sees, pixels.
        tiling: how images are cut.
        most: detections that are kept of an image that was cut.
    """
    if tiling is not None:
        return TiledEval(table, imgsz, tiling, most)
    return SCORING[table.task](table, imgsz)
