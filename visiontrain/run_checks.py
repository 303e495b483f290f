"""What does not go together in a run: values out of range, and keys that change nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path

from visiontrain.core.config import Section
from visiontrain.core.errors import ConfigError
from visiontrain.data.config import ClassifyAugment, sides
from visiontrain.models.config import ClassifierConfig
from visiontrain.recipe import Run, foreign, timm
from visiontrain.strategies.config import (
    DDP,
    HALVING,
    Client,
    ParameterServer,
    check_client,
    check_data_parallel,
    check_servers,
)
from visiontrain.strategies.federated.config import Federated, check_federated
from visiontrain.strategies.keeping import check_same_clients

FIXED = (  # what a run that goes on cannot change: its state and its place in the data hang on it
    ("model",),
    ("batch",),
    ("imgsz",),
    ("seed",),
    ("data", "source"),
    ("data", "train_images"),
    ("data", "fraction"),
    ("data", "single_cls"),
    ("data", "tile"),
    ("data", "overlap"),
    ("data", "balance"),
    ("data", "balance_threshold"),
    ("data", "window"),
    ("freeze",),
    ("ema",),
    ("optim", "kind"),
    ("weights",),
)
OWN_LOSS = ("box", "cls", "l1", "topk", "alpha", "beta")
IDLE: Sequence[tuple[str, Callable[[Run], bool], str]] = (  # key, whether it is used, advice
    (
        "task.iou",
        lambda run: getattr(run.task, "nms", True) or run.model.suppressed,
        "add nms=true",
    ),
    (
        "model.pretrained",
        lambda run: foreign(run) or getattr(run.model, "backbone", None) is not None,
        "add model.backbone",
    ),
    ("data.single_cls", lambda run: run.task.kind == "detect", "take task=detect"),
    ("data.tile", lambda run: run.task.kind == "detect", "take task=detect"),
    ("data.overlap", lambda run: run.data.tile is not None, "add data.tile"),
    ("data.balance", lambda run: not run.data.single_cls, "take data.single_cls=false"),
    (
        "data.balance_threshold",
        lambda run: run.data.balance == "repeat",
        "take data.balance=repeat",
    ),
    *(
        (f"model.{key}", lambda run: run.task.kind == "detect" or timm(run), advice)
        for key, advice in (
            ("backbone", "take model=timm"),
            ("head", "take task=detect"),
            ("finest", "take task=detect"),
        )
    ),
    *((f"task.{key}", lambda run: not foreign(run), "take model=yolo_n") for key in OWN_LOSS),
    *(
        (f"task.{key}", lambda run: run.task.loss is None, "it is our loss's: pass no loss=")
        for key in (*OWN_LOSS, "smoothing", "class_weights")
    ),
    ("freeze", lambda run: not foreign(run), "take model.trainable_layers"),
    ("recompute", lambda run: not foreign(run), "take model=yolo_n"),
    ("optim.beta2", lambda run: run.optim.kind != "sgd", "take optim=adamw"),
    ("optim.nesterov", lambda run: run.optim.kind == "sgd", "take optim=sgd"),
    ("optim.ema_window", lambda run: run.ema, "take ema=true"),
    ("save.sharded", lambda run: run.strategy.kind == "fsdp", "take strategy=fsdp"),
    ("patience", lambda run: run.val, "take val=true"),
    ("log.wandb_project", lambda run: "wandb" in run.log.to, "add wandb to log.to"),
    ("log.wandb_mode", lambda run: "wandb" in run.log.to, "add wandb to log.to"),
)


def check_values(run: Run) -> None:
    """Refuse values out of range, and those that change nothing beside the others.

    Raises:
        ConfigError: naming the key.
    """
    for key, used, advice in IDLE:
        *sections, name = key.split(".")
        section = reduce(getattr, sections, run)
        if name not in type(section).model_fields:
            continue  # a key of another kind
        value, default = getattr(section, name), type(section).model_fields[name].default
        if value != default and not used(run):
            raise ConfigError(f"{key}: {value}; it changes nothing here, {advice} or leave it out")
    check_task(run)
    check_loaders(run)
    sharded = "sharded=true" if getattr(run.strategy, "sharded", False) else None
    if run.optim.kind == "muon" and (sharded or run.strategy.kind == "fsdp"):
        raise ConfigError(
            f"optim: muon under strategy{'.' + sharded if sharded else '=fsdp'}, where no process "
            "holds a whole matrix; take adamw"
        )
    _check_mode(run)
    check_stages(run)
    spread = getattr(run.augment, "multi_scale", 0)
    if spread and len(sides(run.imgsz, run.augment)) == 1:
        raise ConfigError(
            f"augment.multi_scale: {spread}; no other multiple of 32 lies so near to {run.imgsz}, "
            f"take {32 / run.imgsz:.2g} or more"
        )
    check_batch(run)
    if foreign(run) and run.strategy.kind in ("pipeline", "placement"):
        raise ConfigError(
            f"strategy: {run.strategy.kind}, but {run.model.kind} is one block, which cannot be "
            "cut; take strategy=ddp or strategy=fsdp"
        )


def _check_mode(run: Run) -> None:
    """Refuse keys of the mode that change nothing, or do not go together."""
    if isinstance(run.strategy, DDP):
        check_data_parallel(run.strategy)
    if isinstance(run.strategy, ParameterServer):
        check_servers(run.strategy, run.batch, run.precision)
    if isinstance(run.strategy, Federated):
        check_federated(run.strategy, run.epochs)
        check_clients(run)
    if isinstance(run.strategy, Client):
        check_client(run.strategy)
        _check_whole(run)


def check_clients(run: Run) -> None:
    """Refuse what clients of a federated run cannot do.

    Raises:
        ConfigError: naming the key.
    """
    assert isinstance(run.strategy, Federated)
    if run.precision == "fp16":
        raise ConfigError(
            "precision: fp16 with strategy=federated, whose clients have no common loss scale; "
            "take bf16"
        )
    if run.batch < 0:
        raise ConfigError(
            f"batch: {run.batch} with strategy=federated, whose clients differ; take a number"
        )
    if run.strategy.serve is not None and (run.data.train_images, run.data.fraction) != (None, 1):
        raise ConfigError(
            "data: train_images or fraction with strategy.serve, whose clients say for themselves "
            "what they train on; leave it out"
        )
    _check_whole(run)


def _check_whole(run: Run) -> None:
    """Refuse what does not go with data that are dealt out."""
    for key in ("tile", "balance", "window"):
        value = getattr(run.data, key)
        if value != type(run.data).model_fields[key].default:
            kind = run.strategy.kind
            raise ConfigError(f"data.{key}: {value}; strategy={kind} has no such, leave it out")


def check_loaders(run: Run) -> None:
    """Refuse a number of loader processes that cannot be.

    Raises:
        ConfigError: naming data.workers.
    """
    count = run.data.workers
    if count == "auto":
        return
    if count < 0:
        raise ConfigError(f"data.workers: {count}; take auto, 0 or more")
    if count > 1 and isinstance(run.strategy, ParameterServer):
        raise ConfigError(
            f"data.workers: {count} with strategy=parameter_server, whose workers read ahead with "
            "one process each; take auto, 0 or 1"
        )


def check_task(run: Run) -> None:
    """Refuse a model or an augmentation that is made for another task.

    Raises:
        ConfigError: naming the key.
    """
    kind = run.task.kind
    if kind == "detect" and isinstance(run.model, ClassifierConfig):
        raise ConfigError(
            f"model: {run.model.kind} classifies whole images; take model=yolo_n, or task=classify "
            "and data of classes"
        )
    if kind == "classify" and foreign(run):
        raise ConfigError(
            f"model: {run.model.kind} finds objects; take model=yolo_n, resnet_tiny or timm"
        )
    if isinstance(run.augment, ClassifyAugment) and run.augment.mixup + run.augment.cutmix > 1:
        raise ConfigError(
            f"augment.cutmix: {run.augment.cutmix} with augment.mixup={run.augment.mixup}; no "
            "sample is mixed twice, so together they are 1 at most"
        )
    fitting = {"detect": "standard", "classify": "classify"}[kind]
    if run.augment.kind not in (fitting, "none"):
        raise ConfigError(
            f"augment: {run.augment.kind} with task={kind}; take augment={fitting} or augment=none"
        )


def check_stages(run: Run) -> None:
    """Refuse what does not go with the way a model is cut over processes or devices.

    Raises:
        ConfigError: naming the key.
    """
    schedule = getattr(run.strategy, "schedule", None)
    if run.recompute and schedule in HALVING:
        raise ConfigError(
            f"recompute: true with strategy.schedule={schedule}, which cuts the backward pass in "
            "two; take another schedule"
        )
    if run.strategy.kind != "placement":
        return
    if run.recompute:
        raise ConfigError(
            "recompute: true with strategy=placement, whose blocks would draw other random numbers "
            "the second time; leave it out"
        )
    if run.batch < 0:
        raise ConfigError(
            f"batch: {run.batch} with strategy=placement, whose devices differ; take a number"
        )


def check_batch(run: Run) -> None:
    """Refuse a batch that cannot be, or not be cut as asked.

    Raises:
        ConfigError: naming the key.
    """
    if run.batch == 0:
        raise ConfigError("batch: 0; take 1 or more, or -1 for what fits into memory")
    if run.batch < 0 and foreign(run):
        raise ConfigError(
            f"batch: {run.batch}; what fits is not known of {run.model.kind}, take a number"
        )
    if 0 < run.batch < run.accumulate:
        raise ConfigError(
            f"accumulate: {run.accumulate}; a batch of {run.batch} images has no more than "
            f"{run.batch} parts"
        )


def check_fixed(old: Run, new: Run) -> None:
    """Refuse to go on with a run under another data order, model or optimizer.

    Raises:
        ConfigError: naming the key.
    """
    check_same_clients(old.strategy, new.strategy)
    moved = None not in (old.data.own, new.data.own)  # a checkpoint knows its labels
    moved |= Path(old.data.source).name == Path(new.data.source).name
    for keys in FIXED:
        was, now = reduce(getattr, keys, old), reduce(getattr, keys, new)
        if isinstance(was, Section) and isinstance(now, Section):
            was, now = was.model_dump(exclude={"own"}), now.model_dump(exclude={"own"})
        if was != now and not (moved and keys == ("data", "source")):
            raise ConfigError(
                f"{'.'.join(keys)}: {now}, but the run in out has {was}; "
                "leave it away, or start a new run without resume=true"
            )
