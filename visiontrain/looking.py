"""What the runs of a comparison find on the same pictures, for its page."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from visiontrain.core.own import objects_of
from visiontrain.data.open import open_dataset
from visiontrain.engine.run_folder import RunFolder
from visiontrain.predict_config import DetectorConfig
from visiontrain.prediction import load
from visiontrain.recipe import Run
from visiontrain.report.rows import Row
from visiontrain.report.side_by_side import FAULTS, Predict, Sample, samples
from visiontrain.strategies.devices import devices
from visiontrain.tasks.registry import as_task

LOW = 0.01  # least score that is asked for: the page says how near the nearest was
_warn = logging.getLogger(__name__).warning


def look(run: Run, folder: RunFolder, rows: Sequence[Row]) -> list[Sample]:
    """Let the best weights of each row's first run look at a few images of the val split.

    One row's weights are held at a time. What cannot be shown costs a warning: the comparison is
    complete without it.

    Args:
        run: one of them, settled: whose data are shown.
        folder: of the comparison.
        rows: of it.
    """
    modes: dict[str, Callable[[], Predict]] = {}
    for row in rows:
        first = next((trial for trial in row.trials if not trial.error), None)
        if first is not None:
            modes[row.name] = partial(_predict, run, RunFolder(folder.path / first.folder))
    if not modes:
        return []
    try:
        table = as_task(open_dataset(run.data, run.task.kind).table("val"), run.task)
        return samples(table, modes)
    except FAULTS as error:
        _warn("pictures: %s; report.html is complete without them", error)
        return []


def _predict(run: Run, folder: RunFolder) -> Predict:
    device = str(devices(run.device)[0])
    config = DetectorConfig(weights=str(folder.path), conf=LOW, device=device)
    predictor = load(config, objects_of(run))
    return partial(_first, predictor.predict)


def _first(predict, pixels):  # noqa: ANN001, ANN202 - of a detector or a classifier
    return predict(pixels)[0]
