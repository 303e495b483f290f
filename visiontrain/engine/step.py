"""The training step. Every mode, centralized or not, trains through this one function."""

from __future__ import annotations

from collections.abc import Sequence

from visiontrain.core.types import Batch, StepResult
from visiontrain.engine.learner import Learner


def train_step(learner: Learner, micro_batches: Sequence[Batch], images: int) -> StepResult:
    """Make one optimizer update from this process's micro-batches.

    The strategy decides where gradients are summed and who applies them; this function decides
    the order, which is the same everywhere.

    Args:
        learner: what trains.
        micro_batches: at least one; images with `valid=0` fill the place of missing data.
        images: how many images the whole step has, over all ranks.
    """
    learner.begin()
    loss = learner.strategy.forward_backward(learner, micro_batches)
    grad_norm = learner.strategy.apply(learner)
    learner.step += 1
    learner.samples += images
    return StepResult(loss.terms, loss.counts, grad_norm)
