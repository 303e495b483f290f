"""What the verbs do before any process of a run starts: resolve, hold the folder, launch."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from visiontrain.core.config import merge
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.own import Objects, objects_of, with_objects
from visiontrain.data.defects import printable
from visiontrain.data.open import open_dataset
from visiontrain.dealing import splits_of
from visiontrain.engine.parity import Parity, Report
from visiontrain.engine.signals import INTERRUPTED
from visiontrain.predict_config import PredictConfig
from visiontrain.prediction import (
    Predicted,
    Say,
    from_text,
    mode_of,
    prepare_prediction,
    read_result,
    to_text,
)
from visiontrain.prediction import folder_of as folder_of_prediction
from visiontrain.prepare import (
    below,
    check_group,
    folder_of,
    prepare,
    restarted,
    settle_tree,
    with_batch,
)
from visiontrain.recipe import Run
from visiontrain.scoring import prepare_validation
from visiontrain.strategies import launch
from visiontrain.strategies.config import Client, Placement, Single
from visiontrain.strategies.environment import is_first, launched, wants_torchrun
from visiontrain.strategies.member import once

_warn = logging.getLogger(__name__).warning

TOLD = 20  # files left out, each by a line
WORKER = "visiontrain.worker"  # sits above this module and is only named here


def train(run: Run | Callable[[], Run], objects: Objects | None = None) -> tuple[Run, int]:
    """Train as `run` says; return the run as it was settled, and the exit code.

    Args:
        run: the config, or what reads it. Under a launcher only rank 0 calls that: others may
            not see the folder of a run that goes on.
        objects: of the user's, which the config names; default: those in it.

    Raises:
        VisiontrainError: with one line for the user.
    """
    given = objects_of(run) if isinstance(run, Run) else objects or {}
    return _start(lambda: prepare(run() if callable(run) else run), "main", given)


def validate(run: Run | Callable[[], Run], objects: Objects | None = None) -> tuple[Run, int]:
    """Score `run.weights` on `run.split`; take and return as `train`.

    Raises:
        VisiontrainError: with one line for the user.
    """
    given = objects_of(run) if isinstance(run, Run) else objects or {}

    def made() -> Run:
        return run() if callable(run) else run

    return _start(lambda: prepare_validation(made(), given), "validate", given)


def predict(config: PredictConfig, say: Say, objects: Objects | None = None) -> Predicted:
    """Predict on `config.source`; `say` is told of files that can't be read, and the end.

    Args:
        config: what to do.
        say: shows one line to a person.
        objects: of the user's: a model of their own, where the weights are of one.

    Raises:
        VisiontrainError: with one line for the user.
        KeyboardInterrupt: at Ctrl-C, when what was found before is written.
    """
    _refuse_half_a_launcher()

    def settled(before: str | None) -> str:
        folder = None if before is None else folder_of_prediction(from_text(before))
        return to_text(prepare_prediction(config, folder, objects or {}))

    text = once("predict", settled)
    config = from_text(text)
    folder = folder_of_prediction(config)
    try:
        mode, entry = mode_of(config), _entry("predict")
        code = launch.run(mode, config.device, entry, text, objects or {})
    except Exception:
        if is_first():
            folder.discard_unused()
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    result = read_result(config, code)
    _tell(result, say if is_first() else lambda _: None)
    # Under a launcher, other machines may not see what the first process wrote.
    if folder.metrics.is_file() and not result.rows and not code:
        first = f"; first: {result.unreadable[0]}" if result.unreadable else ""
        raise DataError(
            f"source: nothing in {config.source!r} could be read{first}; all: {folder.metrics}"
        )
    return result


def _tell(result: Predicted, say: Say) -> None:
    for reason in result.unreadable[:TOLD]:
        say(printable(f"left out: {reason}"))
    if len(result.unreadable) > TOLD:
        say(f"left out: {len(result.unreadable) - TOLD:,} more, see metrics.json")
    if result.rows:
        say(printable(result.summary()))


def _refuse_half_a_launcher() -> None:
    if wants_torchrun():
        raise ConfigError(
            "strategy: PET_NNODES or PET_NPROC_PER_NODE asks for torchrun; start this with it, as "
            "python -m torch.distributed.run FILE"
        )


def _start(make: Callable[[], Run], entry: str, objects: Objects) -> tuple[Run, int]:
    """Prepare a run once, then call `worker.entry` in every process that its mode needs."""
    _refuse_half_a_launcher()

    def settled(before: str | None) -> str:
        verb = "train" if entry == "main" else "val"
        run = None if before is None else restarted(before, verb)
        run = with_objects(run, objects) if run else make()
        return _filled(run, entry).model_dump_json()

    text = once(entry, settled)
    run = with_objects(Run.model_validate_json(text), objects)
    try:
        # Under a launcher every process comes here.
        with folder_of(run).held() if is_first() else nullcontext():
            return run, launch.run(run.strategy, run.device, _entry(entry), text, objects)
    except Exception:
        if is_first() and not run.resume:
            folder_of(run).discard_unused()
        raise


def _filled(run: Run, entry: str) -> Run:
    """Write the cache on disk, which many processes would else each write."""
    if run.data.cache == "disk" and not isinstance(run.strategy, Single | Placement | Client):
        spec = open_dataset(run.data, run.task.kind)
        try:
            for split in splits_of(run) if entry == "main" else (run.split,):
                spec.table(split)
        except Exception:
            folder_of(run).discard_unused()
            raise
    return run


def _entry(name: str) -> launch.Entry:
    return getattr(importlib.import_module(WORKER), name)


def parity(
    run: Run, steps: int = 20, precisions: Sequence[str] = (), controls: Path | None = None
) -> Report:
    """Measure whether `run.strategy` trains as one device does.

    Args:
        run: the config; its folder is not touched.
        steps: optimizer steps to compare.
        precisions: as for `Parity`.
        controls: as for `Parity`.

    Raises:
        VisiontrainError: with one line for the user.
    """
    if launched() is not None:
        raise ConfigError("parity: under a launcher; start it without, it starts its own processes")
    given = run.model_dump(exclude_unset=True)
    whole = settle_tree(merge(Run, below(given), given))
    if getattr(whole.strategy, "memory", None) is not None:
        _warn("strategy.memory: it changes no result, and parity cuts without it")
        strategy = whole.strategy.model_copy(update={"memory": None})
        whole = whole.model_copy(update={"strategy": strategy})
    if "compress_after" in run.strategy.model_fields_set and (
        getattr(whole.strategy, "compress", "none") != "none"
    ):
        _warn("strategy.compress_after: parity compresses from the first step on, to measure it")
    whole = with_batch(whole)
    check_group(whole)
    comparison = Parity(
        whole.model_dump(mode="json"),
        whole.strategy,
        _entry("traced"),
        steps=steps,
        precisions=precisions,
        controls=controls,
        objects=objects_of(run),
    )
    return comparison.measure()
