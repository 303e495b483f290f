"""The runs of a comparison, one after another: trained, or found complete, and measured."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from visiontrain import commands
from visiontrain.compare_config import CompareConfig, Mode, flat, run_of, seeds
from visiontrain.core.durable import digest_of, replace_file, storing, to_json
from visiontrain.core.errors import CheckpointError, ConfigError, VisiontrainError
from visiontrain.core.explain import short
from visiontrain.core.yaml_loader import load_yaml
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.signals import Halt
from visiontrain.loggers.csv import read_rows
from visiontrain.prepare import config_sha256, config_text, settled
from visiontrain.recipe import Run
from visiontrain.report.rows import (
    CONTROL,
    ONE_DEVICE,
    Row,
    Trial,
    measured,
    together,
)
from visiontrain.report.whole import note_whole, whole_of, with_restarts
from visiontrain.strategies.config import Client, Single
from visiontrain.strategies.environment import RESTARTED

PARITY = "parity.json"  # in a run's folder: how exact its mode is
PACE = "pace"  # in the comparison's: runs of one epoch, under budget=seconds
FREE = (  # what a run may be given anew when it goes on: none of it changes a step that was made
    *("time", "patience", "save", "log", "data.workers", "data.cache"),
    *("data.cache_dir", "strategy.timeout_s", "strategy.max_restarts"),
)
# Learning rates follow a run's whole length, which under budget=seconds its pace decides.
LENGTHS = ("epochs", "strategy.rounds")
LONGEST = 300  # letters of why something could not be measured
PRECISION = "fp64"  # in which rounding cannot hide behind chaos

Tree = dict[str, Any]
Say = Callable[[str], None]  # shows one line to a person
T = TypeVar("T")
_log = logging.getLogger(__name__).error


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is to be."""

    mode: Mode
    name: str  # of its folder
    changes: Mapping[str, Any]  # plain keys on top of its mode's: its seed, and what it gets
    run: Run  # settled, without a folder
    start: str  # sha256 of the weights that it has to begin with

    @property
    def seed(self) -> int:
        """Return its seed."""
        return self.run.seed


@dataclass(frozen=True, slots=True)
class Entry:
    """A row that is to be, and its runs."""

    mode: Mode
    jobs: Sequence[Job]
    alone: str = ""  # of a federated run: the row of its clients without each other


@dataclass(frozen=True)
class Series:
    """Trains and measures.

    Args:
        config: what was asked for.
        folder: of the comparison.
        controls: a folder for what one device does when exactness is measured.
        stopped: returns the exit code of a signal that others took, or 0.
        say: shows one line to a person.
    """

    config: CompareConfig
    folder: RunFolder
    controls: Path
    stopped: Callable[[], int]
    say: Say

    @property
    def _free(self) -> Sequence[str]:
        """Return the keys that a run may be given anew."""
        return (*FREE, *LENGTHS) if self.config.budget == "seconds" else FREE

    def row(self, entry: Entry, *, control: bool, seconds: float | None) -> Row:
        """Train what is not done yet of a row.

        Args:
            entry: the row.
            control: whether others are compared with it.
            seconds: what each run gets; None where that is not what is shared out.

        Raises:
            Halt: a signal came.
        """
        trials = [self._trial(job, seconds) for job in entry.jobs]
        first = entry.jobs[0].run
        strategy = first.strategy.model_dump(mode="json")
        row = Row(entry.mode.name, strategy, dict(entry.mode.keys), alone=entry.alone)
        if entry.mode.rivals:
            best, reasons = best_of(trials, len(entry.mode.rivals))
            return replace(together(row, best), exactness=ONE_DEVICE, reasons=reasons)
        return self._checked(entry, together(row, trials), control=control)

    def refuse_changed(self, entries: Sequence[Entry]) -> None:
        """Refuse to go on with runs whose weights were trained under another config.

        Raises:
            ConfigError: naming the folder, the key, and both values.
        """
        for job in (job for entry in entries for job in entry.jobs):
            own = self.folder_of(job.name)
            if own.config.is_file():
                self._refuse(job, own)

    def _refuse(self, job: Job, own: RunFolder) -> None:
        """Refuse what lies in a run's folder if it is of another config.

        It is compared with what would begin anew: what goes on takes from its folder what is not
        said, a key that was taken out of the file too.
        """
        chosen = run_of(self.config, job.mode, job.changes).batch < 0  # by the run itself
        refuse_other(own, job.run, (*self._free, "batch") if chosen else self._free)

    # -- training -----------------------------------------------------------------

    def _trial(self, job: Job, seconds: float | None) -> Trial:
        self.say(job.name)
        trial = Trial(job.name, job.seed)
        found = self.attempt(job.name, lambda: self._trained(self._paced(job, seconds)))
        return replace(trial, error=found) if isinstance(found, str) else found

    def attempt(self, what: str, action: Callable[[], T]) -> T | str:
        """Return what `action` does, or its error: a mode that is broken costs its row alone.

        Raises:
            Halt: when a signal came meanwhile, for which the action may have failed.
        """
        try:
            done: T | str = action()
        except VisiontrainError as error:
            done = str(error)
        except Exception as error:  # noqa: BLE001 - said with its traceback
            _log("%s failed", what, exc_info=True)
            done = f"{type(error).__name__}: {error}"
        if self.stopped():
            raise Halt(self.stopped())
        if isinstance(done, str):
            self.say(f"{what} failed: {done}")
        return done

    def _trained(self, job: Job) -> Trial:
        folder = self._complete(job)
        if folder is None:
            folder = self.folder_of(job.name)
            began, fresh, before = time.monotonic(), not folder.config.is_file(), len(RESTARTED)
            run = self._typed(job, folder)
            code = commands.train(run)[1]
            if code:
                raise Halt(self.stopped() or code)
            if fresh:
                note_whole(folder, time.monotonic() - began, len(RESTARTED) - before)
        else:
            self.say(f"complete already: {folder.path}")
        metrics = read(folder.metrics)
        began_with = metrics["initial_sha256"]
        if began_with != job.start:
            raise CheckpointError(
                f"weights: {job.name} began with {began_with[:16]}, not with {job.start[:16]} as "
                "the others; compare in a new folder"
            )
        trial = Trial(job.name, job.seed, folder.path.name)
        whole, restarts = whole_of(folder, metrics.get("config_sha256"))
        found = measured(trial, metrics, read_rows(folder.results), whole)
        return with_restarts(found, restarts)

    def _typed(self, job: Job, folder: RunFolder) -> Run:
        """Return a run as it is to be started in its folder, or to go on there."""
        place = {"out": str(folder.path), "resume": folder.config.is_file()}
        return run_of(self.config, job.mode, {**job.changes, **place})

    def _complete(self, job: Job) -> RunFolder | None:
        """Return where a run came to its end under this very config, if anywhere.

        Raises:
            ConfigError: its own folder holds a run of another config.
        """
        own = self.folder_of(job.name)
        if own.config.is_file():
            self._refuse(job, own)
            sha256 = config_sha256(settled(self._typed(job, own)))
            if own.metrics.is_file() and read(own.metrics).get("config_sha256") == sha256:
                return own
            return None  # it goes on
        text = config_text(job.run)
        return next((f for f in self._finished if same_config(f, text)), None)

    @cached_property
    def _finished(self) -> list[RunFolder]:
        """List the runs that were complete when the comparison began to look."""
        found = [RunFolder(path.parent) for path in self.folder.path.glob("*/metrics.json")]
        return sorted(found, key=lambda folder: folder.path)

    def folder_of(self, name: str) -> RunFolder:
        """Return where a run lies."""
        return RunFolder(self.folder.path / name)

    # -- equal time -----------------------------------------------------------------

    def _paced(self, job: Job, seconds: float | None) -> Job:
        """Give a run as many epochs as fit into so many seconds, by the pace of the first seed's.

        One for all: with seeds of a pace of their own, a run would be of another length each time.
        """
        if seconds is None:
            return job
        unit = getattr(job.run.strategy, "local_epochs", 1)
        folder = RunFolder(self.folder.path / PACE / job.mode.name)
        given = {**job.changes, "seed": seeds(self.config)[0], "epochs": unit}
        one = settled(run_of(self.config, job.mode, given))
        if folder.metrics.is_file() and not same_config(folder, config_text(one)):
            shutil.rmtree(folder.path)  # the pace of another config
        if not folder.metrics.is_file():
            self.say(f"{job.mode.name}: an epoch to learn its pace")
            place = {"out": str(folder.path), "resume": folder.config.is_file()}
            code = commands.train(run_of(self.config, job.mode, {**given, **place}))[1]
            if code:
                raise Halt(self.stopped() or code)
        epochs = unit * units_in(seconds, read(folder.metrics))
        changes = {**job.changes, "epochs": epochs, "time": seconds / 3600}
        run = settled(run_of(self.config, job.mode, changes))
        return replace(job, changes=changes, run=run)

    # -- how exact ------------------------------------------------------------------

    def _checked(self, entry: Entry, row: Row, *, control: bool) -> Row:
        """Add how exact the mode is."""
        if not row.seeds:
            return row
        if isinstance(entry.mode.strategy, Single | Client):
            return replace(row, exactness=CONTROL if control else ONE_DEVICE)
        if not self.config.check:
            return row
        what = f"measuring how exact {entry.mode.name} is"
        found = self.attempt(what, lambda: self._exactness(entry, row))
        if isinstance(found, str):
            return replace(row, reasons=[" ".join(found.split())[:LONGEST]])
        gaps = [check["measured"] for check in found["checks"] if check["name"] == "weights"]
        return replace(
            row,
            exactness=found["verdict"],
            reasons=found["reasons"],
            check_steps=found["steps"],
            gap=max(gaps, default=None),
        )

    def _exactness(self, entry: Entry, row: Row) -> Tree:
        """Measure one mode against one device, or take what its parity.json says."""
        first = next(trial for trial in row.trials if not trial.error)
        path = self.folder_of(first.folder or first.name).path / PARITY
        of: Tree = {"config_sha256": first.config_sha256, "asked_steps": self.config.check_steps}
        found = read(path) if path.is_file() else {}
        if not of.items() <= found.items():
            found = of | self._parity(entry)
            with storing(path):
                replace_file(path, to_json(found))
        return found

    def _parity(self, entry: Entry) -> Tree:
        """Measure one mode against one device."""
        steps, job = self.config.check_steps, entry.jobs[0]
        self.say(f"how exact {entry.mode.name} is, over {steps} steps in {PRECISION}")
        mode = job.mode
        if getattr(mode.strategy, "memory", None) is not None:  # it changes no result
            mode = replace(mode, strategy=mode.strategy.model_copy(update={"memory": None}))
        run = run_of(self.config, mode, job.changes)
        of = text_sha256(
            json.dumps(entry.mode.keys, sort_keys=True, default=str)
        )  # one device does the same for all modes with these keys
        report = commands.parity(run, steps, (PRECISION,), self.controls / of)
        checks = [asdict(check) for check in report.checks]
        found = {"verdict": report.verdict, "reasons": list(report.reasons), "checks": checks}
        return {**found, "steps": report.steps}


def best_of(trials: Sequence[Trial], count: int) -> tuple[list[Trial], list[str]]:
    """Choose the best of `count` runs for each seed; say which, and how the others did.

    Where one has no score, the whole seed has its error: the best might be that one.
    """
    best, reasons = list[Trial](), list[str]()
    for seed in dict.fromkeys(trial.seed for trial in trials):
        group = [trial for trial in trials if trial.seed == seed]
        failed = next((trial for trial in group if trial.error), None)
        if failed is not None:
            best.append(replace(failed, error=f"{failed.name}: {failed.error}"))
            continue
        chosen = max(group, key=lambda trial: trial.score or 0.0)
        scores = ", ".join("-" if t.score is None else f"{t.score:.3f}" for t in group)
        best.append(chosen)
        reasons.append(
            f"seed {seed}: client {group.index(chosen)} is the best of {count} on the val split: "
            f"{scores}"
        )
    return best, reasons


def units_in(seconds: float, metrics: Mapping[str, Any]) -> int:
    """Return how many epochs, or rounds, fit into so many seconds; one at least.

    Args:
        seconds: to train, score and save in, and to score the best weights at the end.
        metrics: of a run of one, which is scored twice.
    """
    rate = metrics["train_images_per_s"]
    train = metrics["samples"] / rate if rate else 0.0
    score = max(0.0, metrics["seconds"] - train) / 2
    return max(1, int((seconds - score) / max(train + score, 1e-9)))


def same_config(folder: RunFolder, text: str) -> bool:
    """Tell whether a run that is complete ran under a config, whatever stages it chose itself."""
    if not folder.config.is_file():
        return False
    if read(folder.metrics).get("config_sha256") != digest_of(folder.config):
        return False
    theirs, ours = (load_yaml(t, "config.yaml") for t in (folder.config.read_text(), text))
    if ours["strategy"].get("stages") == "auto":
        theirs["strategy"]["stages"] = "auto"
    return theirs == ours


def refuse_other(folder: RunFolder, wanted: Run, free: Sequence[str] = FREE) -> None:
    """Refuse to take a run for one of another config, but for what changes no step.

    Args:
        folder: where it lies.
        wanted: the config that it would get.
        free: keys, or sections, that may differ.

    Raises:
        ConfigError: naming the key.
    """
    texts = folder.config.read_text(encoding="utf-8"), config_text(wanted)
    old, new = (dict(flat(load_yaml(text, str(folder.config)))) for text in texts)
    for key in sorted(old.keys() | new.keys()):
        was, now = old.get(key), new.get(key)
        may = any(key == name or key.startswith(f"{name}.") for name in free)
        chosen = key == "strategy.stages" and now == "auto"  # the run chose them itself
        if was != now and not may and not chosen:
            raise ConfigError(
                f"{key}: {short(repr(now))}, but the run in {folder.path} was trained with "
                f"{short(repr(was))}; say so to go on with it, or take another out="
            )


def text_sha256(text: str) -> str:
    """Return the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> Tree:
    """Read a JSON file of ours, which is whole or absent."""
    return json.loads(path.read_text(encoding="utf-8"))
