"""From what was asked of a validation to one that anyone can repeat."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from visiontrain.core.config import merge
from visiontrain.core.errors import ConfigError
from visiontrain.core.own import NONE, Objects, refuse_missing, with_objects
from visiontrain.engine.run_folder import RunFolder, claim, home
from visiontrain.engine.weights import WeightsMeta, load_meta
from visiontrain.models.registry import check_input
from visiontrain.prepare import Tree, absolute, placed, read_config, settle_tree, write_config
from visiontrain.recipe import Run, scored_at_once
from visiontrain.staging import check_uses
from visiontrain.strategies.devices import devices
from visiontrain.strategies.precision import slow

SCORED_AS_TRAINED = {  # unless val is told otherwise
    *("data", "imgsz", "batch", "precision", "task", "project")
}

SCORING = ("single", "ddp", "fsdp", "pipeline", "placement")  # modes that share scoring out

OF_WEIGHTS = ("single_cls", "tile", "overlap")  # keys of data that weights are made for


def below_validation(given: Mapping[str, Any]) -> Tree:
    """Return what the keys that were given for a validation lie on: the task of the weights.

    Raises:
        VisiontrainError: when there are none, or they cannot be used.
    """
    return {"task": {"kind": _scored(given.get("weights")).task}}


def _scored(weights: Any) -> WeightsMeta:
    """Return what the weights to score say of themselves."""
    if weights is None:
        raise ConfigError("weights: none given; add weights=FILE or the folder of a run")
    return load_meta(str(weights))


def prepare_validation(run: Run, objects: Objects = NONE) -> Run:
    """Settle a validation as `prepare` does a run; what is open comes from the weights.

    Args:
        run: what was asked for.
        objects: the user's: a model of their own, where the weights are of one.

    Raises:
        VisiontrainError: when the folder, the weights or the data cannot be used.
    """
    meta = _scored(run.weights)
    task = {**meta.task_config, "kind": meta.task, "loss": None}
    base: Tree = {"imgsz": meta.imgsz, "task": task, "name": "val", "augment": {"kind": "none"}}
    old = _run_of(home(str(run.weights)))
    if old is not None:
        base |= _as_trained(old)
        if slow(str(base.get("precision")), devices(run.device)[0]):  # as after a training on GPUs
            del base["precision"]
    given = run.model_dump(exclude_unset=True)
    if old is None and not {"source", "own"} & given.get("data", {}).keys():
        raise ConfigError(
            f"data: not given, and {run.weights} lies in no run that would tell; add data=..."
        )
    _refuse_other(run, given.get("task", {}).get("kind", meta.task), meta.task)
    if run.batch < 0:
        del given["batch"]  # scores are the same with any: that of the run fits
    base["data"] = _data_as_trained(base.get("data", {}), given.get("data", {}), run, meta)
    tree = merge(Run, base, given) | {"model": dict(meta.model), "resume": False}
    tree["task"] = {**tree["task"], "loss": None}  # nothing is trained
    if "model.own" in objects and meta.model.get("kind") != "object":
        raise ConfigError(
            f"model: {run.weights} holds {meta.model.get('kind')}, no model of yours; leave it out"
        )
    run = with_objects(settle_tree(tree), objects)
    if run.imgsz != meta.imgsz:
        check_input(run.model, run.imgsz, meta.task)
    refuse_missing(run, "visiontrain.val(weights=WEIGHTS, {})")
    check_uses(run.strategy, run.model, len(meta.names), meta.task)
    run = placed(run, claim(run.out, home(run.project) / meta.task, run.name))
    write_config(run, "val")
    return run


def _data_as_trained(before: Tree, new: Tree, run: Run, meta: WeightsMeta) -> Tree:
    """Return what is said of the data, by the run that left the weights as far as it holds.

    Args:
        before: `data` of that run; empty if there is none.
        new: `data` as it was asked for.
        run: what was asked for.
        meta: of the weights.

    Raises:
        ConfigError: a cap of another split.
    """
    if run.split == "train" and new.get("val_images") is not None:
        raise ConfigError(
            f"data.val_images: {new['val_images']} with split=train, of which it caps nothing; "
            "leave it out"
        )
    if "own" in new:  # of those in Python names do not tell whether they are others
        found = {key: before[key] for key in OF_WEIGHTS if key in before}
    elif "source" in new and absolute(new["source"]) != before.get("source"):
        found = {}  # what it says, such as a cap, is meant for other data
    else:
        found = dict(before)
    if run.split != "val":
        found.pop("val_images", None)
    if found.get("cache") == "ram":  # which pays from a second epoch on
        del found["cache"]
    if meta.tile is not None:
        side, overlap = meta.tile
        share = min(0.9, overlap / side)  # pixels were rounded, perhaps beyond what is allowed
        found = {"tile": side, "overlap": share} | found
    return found


def _as_trained(folder: RunFolder) -> Tree:
    """Return what a run's config.yaml says of how it was scored: a part of a batch at a time."""
    trained = read_config(folder)
    base = {key: value for key, value in trained.items() if key in SCORED_AS_TRAINED}
    batch, parts = base.get("batch"), trained.get("accumulate", 1)
    side = trained.get("imgsz")
    if isinstance(batch, int) and isinstance(parts, int) and isinstance(side, int):
        base["batch"] = scored_at_once(batch, parts, side)
    return base


def _refuse_other(run: Run, asked: str, task: str) -> None:
    """Refuse a task that is not that of the weights, and modes that only say how to train."""
    if asked != task:
        raise ConfigError(f"task: {asked}, but {run.weights} is of task={task}; leave it out")
    if run.strategy.kind not in SCORING:
        raise ConfigError(
            f"strategy: {run.strategy.kind}; nothing is trained here, take {', '.join(SCORING)}"
        )


def _run_of(weights: Path) -> RunFolder | None:
    """Return the run that left a weights file, if it still lies there."""
    if not weights.is_dir():
        if weights.parent.name != "weights":
            return None
        weights = weights.parent.parent
    folder = RunFolder(weights)
    return folder if folder.config.is_file() else None
