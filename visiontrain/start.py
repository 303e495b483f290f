"""What the model of a run begins with: random weights, a file, a run, or a pretrained backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Progress, VisionModel
from visiontrain.core.types import ClassRows
from visiontrain.data.config import sides
from visiontrain.data.open import open_dataset
from visiontrain.engine.weights import Weights, WeightsMeta, digest, load_weights, start_from
from visiontrain.loggers.console import Silent
from visiontrain.models.config import OwnModel, ResNetTiny
from visiontrain.models.registry import build_model, check_input, pretrained, public
from visiontrain.recipe import Run
from visiontrain.strategies.base import Strategy


def build_fresh(run: Run, names: Sequence[str], progress: Progress | None) -> VisionModel:
    """Make the model from the seed, and what it starts from; not where a checkpoint will come.

    Args:
        run: the config.
        names: the classes.
        progress: is told what the model starts from; None when a checkpoint will be loaded.
    """
    for side in sides(run.imgsz, run.augment):
        check_input(run.model, side, run.task.kind)
    torch.manual_seed(run.seed)
    model = build_model(run.model, len(names), run.task.kind)
    if progress is None:
        return model
    weights = starting_weights(run)
    if weights is not None:
        started = start_from(weights, model.state_dict(), names, class_rows(run))
        model.load_state_dict(started.tensors)
        progress.message(started.line)
        return model
    backbone = pretrained(run.model)
    if backbone:
        model.load_state_dict(model.state_dict() | backbone)
        progress.message(f"backbone: {len(backbone)} pretrained tensors")
    return model


def initial_sha256(run: Run) -> str:
    """Return the `digest` of what a training begins with, before any mode places it."""
    return digest(
        build_fresh(run, open_dataset(run.data, run.task.kind).names, Silent()).state_dict()
    )


def starting_weights(run: Run) -> Weights | None:
    """Return the whole detector that a run starts from: a file, a run or public weights."""
    if run.weights is not None:
        return load_weights(run.weights)
    found = public(run.model)
    if found is None:
        return None
    tensors, names = found
    return Weights(WeightsMeta(run.task.kind, run.model.model_dump(), names, run.imgsz), tensors)


def class_rows(run: Run) -> Mapping[str, ClassRows]:
    """Name the tensors with rows for each class: those whose shape tells one class from two."""
    with torch.device("meta"):
        models = [build_model(run.model, count, run.task.kind) for count in (1, 2)]
    one, two = (model.state_dict() for model in models)
    known = models[0].class_rows
    return {n: known.get(n, ClassRows()) for n in one if one[n].shape != two[n].shape}


def check_statistics(run: Run, images: int, strategy: Strategy) -> None:
    """Refuse BatchNorm over a single number, which torch would do in the midst of a run.

    Raises:
        ConfigError: a map of one place meets a share of one image, or of none.
    """
    last = images % run.batch or min(images, run.batch)
    share = last // (strategy.micro_batches(run.accumulate) * strategy.shares)
    norm = "batch" if isinstance(run.model, OwnModel) else run.model.norm
    one_place = min(sides(run.imgsz, run.augment)) == 32 and not isinstance(run.model, ResNetTiny)
    if norm == "batch" and share < 2 and one_place:
        key = "imgsz" if run.imgsz == 32 else "augment.multi_scale"
        raise ConfigError(
            f"{key}: a side of 32 pixels, where BatchNorm needs two images, but shares of an "
            f"epoch's last batch have {share}; take larger sides, another batch or model.norm=group"
        )
