"""Evaluation: every rank scores whole batches of one fixed list, so any world size agrees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontrain.core.errors import DivergedError, Stopped
from visiontrain.core.interfaces import Evaluator, Metrics, Task, VisionModel
from visiontrain.core.types import AS_IT_IS, Batch
from visiontrain.strategies.base import Strategy


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of one split, and the predictions they were computed from."""

    metrics: Metrics  # the same on every rank, to the last bit
    rows: Tensor  # (K, columns) float64 by image, all ranks': what the evaluator gathered


class Scorable(Protocol):
    """A learner, or a model that is only scored."""

    strategy: Strategy
    task: Task

    def evaluating(self) -> AbstractContextManager[VisionModel]:
        """Put the model in evaluation mode, with the weights that are scored."""
        ...


@dataclass(slots=True)
class Trained:
    """A model that is only scored: an optimizer would take a second to make."""

    strategy: Strategy
    task: Task
    model: VisionModel

    @contextmanager
    def evaluating(self) -> Iterator[VisionModel]:
        """Put the model in evaluation mode."""
        yield self.model.eval()


def evaluate(
    learner: Scorable,
    batches: Iterable[Batch],
    evaluator: Evaluator,
    asked: Callable[[], bool] | None = None,
    merge: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> Evaluation:
    """Score the averaged weights (or the plain ones where there is no average). Collective.

    Args:
        learner: whose weights; a training state is as before afterwards.
        batches: this rank's share of the split; as many on every rank. An image with `valid=0`
            only fills a place.
        evaluator: a fresh one, over the whole split's ground truth.
        asked: collective; tells before each batch whether to stop.
        merge: turns the rows of all ranks into rows of whole images, where parts were looked at.

    Raises:
        DivergedError: on every rank, when a score is not finite.
        Stopped: when `asked` said so.
    """
    strategy = learner.strategy
    with learner.evaluating() as model, torch.no_grad():
        strategy.level(model)  # the averages of BatchNorm statistics differ by rank
        for batch in batches:
            if asked is not None and asked():  # before any waits for others on a GPU
                raise Stopped
            placed = batch.to(strategy.place.device, strategy.precision.images)
            outputs = seen(partial(strategy.forward, model), placed, learner.task)
            if outputs is not None:
                predictions = learner.task.decode(outputs, placed)
                real = [i for i, valid in enumerate(batch.valid.tolist()) if valid]
                evaluator.update([predictions[i] for i in real], batch.ids[real])
    rows = merge(strategy.gather(evaluator.rows()))
    rows = rows[rows[:, 0].argsort(stable=True)]  # files are written in this order
    metrics, diverged = strategy.broadcast(_computed(evaluator, rows, strategy))
    if diverged:
        raise DivergedError(diverged)
    return Evaluation(metrics, rows)


def _computed(evaluator: Evaluator, rows: Tensor, strategy: Strategy) -> tuple[Metrics, str]:
    """Return the main process's scores, or why there are none, which all have to know."""
    try:
        return (evaluator.compute(rows) if strategy.place.is_main else {}), ""
    except DivergedError as error:
        return {}, str(error)


def whole(model: VisionModel, batch: Batch) -> Any:
    """Return a model's outputs, all of which lies here, on a placed batch."""
    return model(batch.images)


def seen(forward: Callable[[Batch], Any], batch: Batch, task: Task) -> Any:
    """Return outputs on a placed batch, the mean over the views that the task asks for.

    None on a process that holds no outputs.
    """
    if task.views == AS_IT_IS:  # a detector's outputs are no tensor to take a mean of
        return forward(batch)
    total: Any = None
    for share, images in task.views.of(batch.images):
        outputs = forward(replace(batch, images=images))
        if outputs is not None:
            part = share * outputs.to(torch.promote_types(outputs.dtype, torch.float32))
            total = part if total is None else total + part
    return total


def refuse_nonfinite(*found: Tensor) -> None:
    """Refuse to use what is no number: nothing found would be said of weights that are broken.

    Raises:
        DivergedError: a value is not finite.
    """
    if not all(bool(torch.isfinite(values).all()) for values in found):
        raise DivergedError(
            "prediction: a score or a box is not finite; the weights are damaged, or of a "
            "training that diverged"
        )
