"""What the model of a run begins with: random weights, a file, a run, or a pretrained backbone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Progress, VisionModel
from visiontrain.core.types import ClassRows
from visiontrain.data.config import sides
from visiontrain.data.open import open_dataset
from visiontrain.engine.weights import Weights, WeightsMeta, digest, load_weights, start_from
from visiontrain.loggers.console import Silent
from visiontrain.models.config import OwnModel
from visiontrain.models.registry import build_model, check_input, pretrained, public
from visiontrain.recipe import Run
from visiontrain.strategies.base import Strategy

SMALLEST = 32  # pixels, where a map of stride 32 has one place
TOO_FEW = "Expected more than 1 value per channel"  # what torch says then


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
    if weights is None or not _has_body(weights, model):
        backbone = pretrained(run.model)
        if backbone:
            model.load_state_dict(model.state_dict() | backbone)
            progress.message(f"backbone: {len(backbone)} pretrained tensors")
    if weights is not None:
        started = start_from(weights, model.state_dict(), names, class_rows(run))
        model.load_state_dict(started.tensors)
        progress.message(started.line)
    return model


def _has_body(weights: Weights, model: VisionModel) -> bool:
    """Tell whether a file has something for what may come pretrained: a head alone has not."""
    mine = {n: t for n, t in model.state_dict().items() if n.startswith(model.body)}
    return not mine or any(
        t.ndim > 1 and n in weights.tensors and weights.tensors[n].shape == t.shape
        for n, t in mine.items()
    )


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


def check_statistics(run: Run, model: VisionModel, images: int, strategy: Strategy) -> None:
    """Refuse BatchNorm over a single number, which torch would do at the end of an epoch.

    Args:
        run: the config.
        model: as built: whole, on the CPU.
        images: of an epoch.
        strategy: how they are shared out.

    Raises:
        ConfigError: the last batch leaves a share of one image, or of none, which one fills.
    """
    last = images % run.batch or min(images, run.batch)
    share = last // (strategy.micro_batches(run.accumulate) * strategy.shares)
    side = min(sides(run.imgsz, run.augment))
    if share < 2 and _needs_two(model, run.freeze, side, alone=strategy.place.world == 1):
        ours = "larger sides or model.norm=group"
        other = "another norm in the model" if isinstance(run.model, OwnModel) else ours
        raise ConfigError(
            f"batch: {run.batch}, but shares of an epoch's last have {share}, and at {side} pixels "
            f"the model's BatchNorm needs two images; take another batch, {other}"
        )


def _needs_two(model: VisionModel, freeze: int, side: int, *, alone: bool) -> bool:
    """Tell whether a model cannot train on one image: it normalises single numbers."""
    norms = {type(module) for module in model.modules() if isinstance(module, _BatchNorm)}
    if nn.SyncBatchNorm in norms and not alone:  # over all shares
        return False
    if not norms or model.reads:  # of torchvision's only the last map, which has one place then
        return bool(norms) and side == SMALLEST
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            trial = copy.deepcopy(model)
            trial.freeze(freeze)
            trial.train()(torch.zeros(1, 3, side, side))
        except ValueError as error:
            return TOO_FEW in str(error)
        except Exception:  # noqa: BLE001 - it cannot be copied, or tried: training will tell
            return False
    return False
