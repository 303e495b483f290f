"""From what was asked to a run that anyone can repeat: its folder, its whole config."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from visiontrain import __version__
from visiontrain.core.config import build, merge, read_tree
from visiontrain.core.durable import replace_file, storing
from visiontrain.core.errors import ConfigError
from visiontrain.core.own import refuse_missing
from visiontrain.core.shipped import shipped
from visiontrain.core.yaml_loader import dump_yaml, load_yaml
from visiontrain.data.config import sides
from visiontrain.data.open import open_dataset
from visiontrain.engine.optim import kind_of, peak
from visiontrain.engine.run_folder import RunFolder, claim, home, reopen
from visiontrain.models.config import TorchvisionConfig
from visiontrain.recipe import Run
from visiontrain.run_checks import check_fixed, check_values
from visiontrain.staging import with_stages
from visiontrain.strategies.config import (
    DDP,
    Client,
    ParameterServer,
    Pipeline,
    check_pipeline,
    check_ranks,
    check_votes,
)
from visiontrain.strategies.devices import devices, settle, world
from visiontrain.strategies.environment import launched
from visiontrain.strategies.federated.config import Federated, in_rounds
from visiontrain.strategies.installed import check_installed
from visiontrain.strategies.precision import LOWER, resolve
from visiontrain.tasks.config import DetectConfig, TaskConfig

# What a data set may say of a run on it: not where the run lies, nor what it starts from.
RECOMMENDED = Run.model_fields.keys() - {"out", "project", "name", "resume", "weights"}

OF_LAUNCHER = ("processes", "max_restarts")  # keys of the strategy that it has a say in

CLASSIFYING: Tree = {"augment": {"kind": "classify"}, "imgsz": 224, "batch": 64}

RESNET_RATE = 1e-4  # what AdamW trains ResNet-50 detectors with, as DETR's (arXiv 2005.12872)

Tree = dict[str, Any]


def prepare(run: Run) -> Run:
    """Settle what is open, claim the run's folder (`out` of the result), write config.yaml.

    Keys the caller set win over those of the run that goes on (`resume`), which win over what
    the data set recommends.

    Raises:
        VisiontrainError: when the folder or the data cannot be used.
    """
    asked = "stages" in run.strategy.model_fields_set
    run, stages = with_stages(settled(run), asked=asked)
    folder = reopen(run.out) if run.resume else None
    if folder is not None and folder.config.is_file():
        refuse_lost(folder)
        check_fixed(build(Run, read_config(folder)), run)
        run = placed(run, folder)  # `fit` writes config.yaml once it goes on
    else:
        place = home(run.project) / run.task.kind
        folder = folder or claim(run.out, place, run.name, resumable=True)
        run = placed(run, folder)
        write_config(run)
    if stages:
        with storing(folder.stages):
            replace_file(folder.stages, "\n".join([*stages, ""]).encode())
    return run


def refuse_lost(folder: RunFolder) -> None:
    """Refuse to begin anew over what a run left whose checkpoints are gone.

    Raises:
        ConfigError: there are results, and nothing to go on from.
    """
    left = [path for path in (folder.results, folder.metrics, folder.best) if path.is_file()]
    if left and not (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
        raise ConfigError(
            f"out: {folder.path} holds {left[0].name} but no checkpoint to go on from; start in "
            "another folder, with weights=FILE if from its weights"
        )


def settled(run: Run) -> Run:
    """Return the whole config of a training; nothing is written.

    Raises:
        VisiontrainError: when it cannot run here, or its folder or data cannot be used.
    """
    given = run.model_dump(exclude_unset=True)
    given["resume"] = goes_on(given)
    base = below(given)
    if given["resume"] and run.batch < 0 < base.get("batch", 0):
        given["batch"] = base["batch"]  # chosen once
    # A file that a validation left may name another split; training scores this one.
    run = settle_tree(merge(Run, base, given) | {"split": "val"})
    run = as_rounds(run, given)
    again = f"out={run.out!r}, resume=True" if run.resume else '"config.yaml"'
    again = again.replace("{", "{{").replace("}", "}}")
    refuse_missing(run, f"visiontrain.train({again}, {{}})")
    run = with_batch(run)
    check_group(run)
    return run


def as_rounds(run: Run, given: Tree) -> Run:
    """Settle how long clients of a federated run train; it keeps no average beside theirs.

    Raises:
        ConfigError: naming the key.
    """
    if not isinstance(run.strategy, Federated):
        return run
    if given.get("ema"):
        raise ConfigError(
            "ema: true with strategy=federated, where weights are means already; leave it out"
        )
    typed = "rounds" in given.get("strategy", {})
    strategy, epochs = in_rounds(
        run.strategy, run.epochs, given="epochs" in given, rounds_given=typed
    )
    run = run.model_copy(update={"strategy": strategy, "epochs": epochs, "ema": False})
    check_values(run)
    return run


def check_group(run: Run) -> None:
    """Refuse what does not go with the number of processes of a settled run, or is not installed.

    Raises:
        ConfigError: naming the key.
    """
    check_installed(run.strategy)
    if isinstance(run.strategy, DDP):
        ranks = world(run.strategy)
        check_votes(run.strategy, ranks, run.batch // run.accumulate)
        check_ranks(run.strategy, ranks, fixed=launched() is None)
    if isinstance(run.strategy, Pipeline):
        check_pipeline(run.strategy, world(run.strategy), run.accumulate)
    if getattr(run.model, "norm", None) == "sync":
        check_sync(run)


def check_sync(run: Run) -> None:
    """Refuse synchronised BatchNorm where no processes hold the same layer, or torch has none.

    Raises:
        ConfigError: always naming model.norm.
    """
    if isinstance(run.strategy, Pipeline):
        raise ConfigError(
            "model.norm: sync in a pipeline, where no two processes hold the same layer; take "
            "model.norm=group"
        )
    if isinstance(run.strategy, Federated | Client | ParameterServer):
        raise ConfigError(
            f"model.norm: sync under strategy={run.strategy.kind}, whose processes do not wait for "
            "each other in the midst of a model; take model.norm=group"
        )
    if devices(run.device)[0].type == "cpu":
        raise ConfigError("model.norm: sync on the CPU; torch has it for GPUs, take group")


def goes_on(given: Mapping[str, Any], file: str = "config.yaml") -> bool:
    """Tell whether what is in `out` goes on; with `resume=auto` it does if there is something.

    Args:
        given: the keys that were given.
        file: what tells that there is something.

    Raises:
        ConfigError: no folder was given for `resume=auto`.
    """
    resume, out = given.get("resume"), given.get("out")
    if resume != "auto":
        return resume is True
    if out is None:
        raise ConfigError("resume: auto without a folder; add out=DIR, where the run is to lie")
    return (home(out) / file).is_file()


def below(given: Mapping[str, Any]) -> Tree:
    """Return what the keys that were given for a training lie on.

    The config of the run that goes on, or what the data set recommends.

    Raises:
        VisiontrainError: when the folder or the data cannot be used.
    """
    if goes_on(given):
        folder = reopen(given.get("out"))
        if folder.config.is_file():
            base = read_config(folder)
            if launched() is not None:  # which tells anew how many processes there are
                for key in OF_LAUNCHER:
                    base.get("strategy", {}).pop(key, None)
            if given.get("strategy", {}).get("kind", "fsdp") != "fsdp":
                base.get("save", {}).pop("sharded", None)  # another mode has no shards to write
            return base
    data = build(Run, {"data": given.get("data", {})}).data
    spec = open_dataset(data, given.get("task", {}).get("kind"))
    recommended = read_tree(Run, spec.defaults, f"{data.source}: defaults", RECOMMENDED)
    recommended |= _model_of(given, spec.task)
    if spec.task == "detect":
        return recommended
    task = {"kind": spec.task, "several": spec.reader.several}
    return merge(Run, CLASSIFYING, recommended | {"task": recommended.get("task", {}) | task})


def _model_of(given: Mapping[str, Any], task: str) -> Tree:
    """Return the model whose weights a training starts from, unless another one is asked for."""
    if given.get("weights") is None:
        return {}
    from visiontrain.engine.weights import load_meta  # noqa: PLC0415 - torch

    meta = load_meta(str(given["weights"]))
    kind = meta.model.get("kind")
    asked = given.get("model", {}).get("kind", kind)
    if meta.task != task or kind == "object" or asked != kind:
        return {}
    # Synchronised norms are the mode's that trained it; plain ones have the same tensors.
    return {"model": {k: v for k, v in meta.model.items() if (k, v) != ("norm", "sync")}}


def restarted(text: str, verb: str) -> Run | None:
    """Take up a run, or a validation, whose processes torchrun started again.

    The ranks may be others, or more or fewer; what `prepare` chose stays.

    Args:
        text: the run as `prepare` settled it, as JSON.
        verb: which repeats it.

    Returns:
        None when it left no folder behind, as after an error of the user's.

    Raises:
        VisiontrainError: when it cannot go on with the processes there are now.
    """
    run = Run.model_validate_json(text)
    if not folder_of(run).config.is_file():
        return None
    given = run.model_dump(exclude={"strategy": set(OF_LAUNCHER)})
    run = build(Run, given)
    run = run.model_copy(update={"strategy": settle(run.strategy, run.device)})
    check_values(run)
    check_group(run)
    run, _ = with_stages(run, asked=False)  # those that were chosen may be too many or too few
    write_config(run, verb)
    return run


def with_batch(run: Run) -> Run:
    """Replace batch=-1 by what fits, so that config.yaml repeats the run on any machine."""
    if run.batch > 0:
        return run
    from visiontrain.engine.autobatch import Room, fitting_batch, free_memory  # noqa: PLC0415
    from visiontrain.models.registry import build_model, check_input  # noqa: PLC0415

    check_input(run.model, run.imgsz, run.task.kind)
    device = devices(run.device)[0]
    spec = open_dataset(run.data, run.task.kind)
    table = spec.cut(spec.read("train"))  # to count: nothing is decoded for it
    with torch.device("meta"):
        model = build_model(run.model, len(table.names), run.task.kind)
    if run.recompute:
        model.recompute_blocks()
    # Stages keep all micro-batches at once; pipelines side by side share them.
    copies = run.strategy.data_parallel if isinstance(run.strategy, Pipeline) else None
    here = getattr(run.strategy, "processes", None) or 1
    room = Room(
        free=free_memory(device, here),
        images=len(table),
        processes=copies or world(run.strategy),
        accumulate=1 if copies else run.accumulate,
        device=device.type,
        width=8 if run.precision == "fp64" else 2 if run.precision in LOWER else 4,
    )
    largest = max(sides(run.imgsz, run.augment))
    run = run.model_copy(update={"batch": fitting_batch(model, largest, room)})
    check_values(run)
    return run


def settle_tree(tree: Tree) -> Run:
    """Check a whole config against this machine; replace `auto` where numbers depend on it."""
    run = build(Run, tree)
    check_values(run)
    strategy = settle(run.strategy, run.device)
    if isinstance(strategy, Federated) and strategy.serve is not None:
        keys = str(home(strategy.keys).absolute())
        strategy = strategy.model_copy(update={"keys": keys})
    precision = resolve(run.precision, devices(run.device)[0])
    optim = run.optim.model_copy(update={"kind": kind_of(run.optim), "lr": _rate(run)})
    data = run.data.model_copy(update={"source": absolute(run.data.source)})
    settled = {"precision": precision, "optim": optim, "data": data, "task": _task(run)}
    return run.model_copy(update={"strategy": strategy, **settled})


def _task(run: Run) -> TaskConfig:
    """Return the task; without one-to-one scores, suppression is no choice."""
    if not isinstance(run.task, DetectConfig):
        return run.task
    return run.task.model_copy(update={"nms": run.task.nms or run.model.suppressed})


def _rate(run: Run) -> float:
    """Return the highest learning rate, by default a lower one for a ResNet under AdamW.

    At 0.002 the losses of torchvision's detectors rise to hundreds in the first steps.
    """
    slow = isinstance(run.model, TorchvisionConfig) and kind_of(run.optim) == "adamw"
    return run.optim.lr or (RESNET_RATE if slow else peak(run.optim))


def absolute(source: str) -> str:
    """Return where a data set lies, so that the run can be scored from another folder."""
    if source in {known.stem for known in shipped("datasets").glob("*.yaml")}:
        return source
    try:
        path = Path(source).expanduser()
        return str(path.absolute()) if path.exists() else source
    except (OSError, RuntimeError, ValueError):  # no path at all; whoever opens it says so
        return source


def placed(run: Run, folder: RunFolder) -> Run:
    """Put a run into a folder."""
    return run.model_copy(update={"out": str(folder.path)})


def write_config(run: Run, verb: str = "train") -> None:
    """Write the config.yaml with which `verb` repeats a run.

    Raises:
        StorageError: when it cannot be written.
    """
    path = folder_of(run).config
    with storing(path):
        replace_file(path, config_text(run, verb).encode())


def read_config(folder: RunFolder) -> Tree:
    """Read the config.yaml that a run left.

    Raises:
        ConfigError: when it is not one.
    """
    tree = load_yaml(folder.config.read_text(encoding="utf-8"), str(folder.config))
    if not isinstance(tree, dict):
        raise ConfigError(f"{folder.config}: no config; give the folder of a run")
    return tree


def config_text(run: Run, verb: str = "train") -> str:
    """Write a run as YAML; without `out` and `resume`, so that it repeats it elsewhere."""
    tree = run.model_dump(mode="json") | {"out": None, "resume": False}
    head = f"# visiontrain {__version__}: `visiontrain {verb}` this file to repeat the run\n"
    return head + dump_yaml(tree)


def config_sha256(run: Run) -> str:
    """Return the sha256 of the config.yaml that a settled run leaves."""
    return hashlib.sha256(config_text(run).encode()).hexdigest()


def folder_of(run: Run) -> RunFolder:
    """Return the folder of a prepared run."""
    return RunFolder(Path(run.out or "."))
