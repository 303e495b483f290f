"""The compare verb: the same training in several modes, one after another, and what each gives."""

from __future__ import annotations

import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from visiontrain import __version__, commands
from visiontrain.compare_config import CompareConfig, Mode, modes, run_of, shared_keys
from visiontrain.core.config import build, merge
from visiontrain.core.durable import replace_file, storing, to_json
from visiontrain.core.errors import CheckpointError, ConfigError, VisiontrainError
from visiontrain.core.own import objects_of, with_objects
from visiontrain.core.yaml_loader import dump_yaml, load_yaml
from visiontrain.engine.run_folder import RunFolder, claim
from visiontrain.engine.signals import Halt, halting
from visiontrain.prepare import below as below_a_run
from visiontrain.prepare import config_sha256, goes_on, settled
from visiontrain.recipe import Run
from visiontrain.report.compare import Comparison, Row, measured, related
from visiontrain.start import initial_sha256
from visiontrain.strategies.config import Single
from visiontrain.strategies.devices import devices
from visiontrain.strategies.environment import cores, launched

ASKED = "compare.yaml"  # in the folder: what was asked for
PARITY = "parity.json"  # in a run's folder: how exact its mode is
FAILED = 1  # exit code
PRECISION = "fp64"  # in which rounding cannot hide behind chaos

Tree = dict[str, Any]
Say = Callable[[str], None]  # shows one line to a person
T = TypeVar("T")
_log = logging.getLogger(__name__).error


def compare(config: CompareConfig, say: Say) -> Comparison:
    """Train in every mode of a list, from the same weights and with the same samples.

    Each run lies in a folder of its own and goes on, or is taken as it is, with `resume`. A mode
    that fails is a row with its error.

    Raises:
        VisiontrainError: before anything starts, when one of the runs cannot be what was asked.
    """
    if launched() is not None:
        raise ConfigError(
            "compare: under torchrun; start it without, its runs start their own processes"
        )
    asked, config = _asked_for(config)
    chosen = modes(config)
    runs = _settled(config, chosen)
    start = initial_sha256(runs[0])
    folder = _folder(config)
    say(f"initial weights of all: sha256 {start}; results go to {folder.path}")
    with (
        folder.held(),
        halting() as stopped,
        tempfile.TemporaryDirectory(prefix="visiontrain-") as controls,
    ):
        _write_asked(folder, asked)
        series = Series(config, folder, start, Path(controls), stopped, say)
        return series.run(list(zip(chosen, runs, strict=True)))


def below(given: Tree) -> Mapping[str, Any]:
    """Return what the keys that were given for a comparison lie on.

    The comparison that goes on, and what its data set recommends.

    Raises:
        VisiontrainError: when the folder or the data cannot be used.
    """
    base = _read_asked(given.get("out")) if goes_on(given, ASKED) else {}
    whole = merge(CompareConfig, base, given) | {"resume": False}
    return merge(CompareConfig, below_a_run(whole), base)


# -- before anything starts -----------------------------------------------------------


def _asked_for(config: CompareConfig) -> tuple[Tree, CompareConfig]:
    """Put what is asked now on the comparison that goes on; return it as given, and checked."""
    given = config.model_dump(mode="json", exclude_unset=True) | {"strategy": shared_keys(config)}
    given["resume"] = goes_on(given, ASKED)
    if given["resume"]:
        given = merge(CompareConfig, _read_asked(config.out), given)
    config = with_objects(build(CompareConfig, given), objects_of(config))
    if config.batch < 0:
        raise ConfigError(
            f"batch: {config.batch}; what fits differs from mode to mode, take a number"
        )
    return given, config


def _read_asked(out: Any) -> Tree:
    if out is None:
        raise ConfigError("resume: true without a folder; add out=DIR, the comparison's")
    path = Path(out) / ASKED
    if not path.is_file():
        raise ConfigError(f"out: {out} holds no {ASKED}; leave resume away to start there")
    tree = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: no config; give the folder of a comparison")
    return tree


def _write_asked(folder: RunFolder, asked: Tree) -> None:
    path = folder.path / ASKED
    tree = {key: value for key, value in asked.items() if key not in {"out", "resume"}}
    head = (
        f"# visiontrain {__version__}: `visiontrain compare` this file to repeat the comparison\n"
    )
    with storing(path):
        replace_file(path, (head + dump_yaml(tree)).encode())


def _settled(config: CompareConfig, chosen: Sequence[Mode]) -> list[Run]:
    """Return every run as it would start here, so that what cannot be is told at once."""
    runs = [settled(run_of(config, mode, None)) for mode in chosen]
    for number, run in enumerate(runs):
        same = next(i for i, other in enumerate(runs) if other.strategy == run.strategy)
        if same < number:
            raise ConfigError(
                f"strategies: {chosen[number].name} is {chosen[same].name} again; leave it out"
            )
    return runs


def _folder(config: CompareConfig) -> RunFolder:
    if config.resume:
        return RunFolder(Path(config.out or "."))
    parent = Path(config.project) / config.task.kind
    return claim(config.out, parent, config.name, resumable=True)


# -- one after another ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Series:
    """The runs of a comparison.

    Args:
        config: what was asked for.
        folder: of the comparison.
        start: sha256 of the weights that every run has to begin with.
        controls: a folder for what one device does when exactness is measured.
        stopped: returns the exit code of a signal that others took, or 0.
        say: shows one line to a person.
    """

    config: CompareConfig
    folder: RunFolder
    start: str
    controls: Path
    stopped: Callable[[], int]
    say: Say

    def run(self, planned: Sequence[tuple[Mode, Run]]) -> Comparison:
        """Train and measure what is not done yet; write the table after each."""
        rows: list[Row] = []
        try:
            for number, (mode, run) in enumerate(planned, 1):
                self.say(f"{number} of {len(planned)}: {mode.name}")
                row = Row(mode.name, run.strategy.model_dump(mode="json"))
                rows.append(self._checked(mode, self._trained(mode, row)))
                code = FAILED if any(row.error for row in rows) else 0
                self._result(rows, planned, code).write()
        except Halt as halt:
            return self._result(rows, planned, halt.exit_code)
        return self._result(rows, planned, code)

    def _result(
        self, rows: Sequence[Row], planned: Sequence[tuple[Mode, Run]], code: int
    ) -> Comparison:
        shared = planned[0][1]
        device = devices(shared.device)[0]
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        system = f"{platform.system()} {platform.machine()}"
        return Comparison(
            folder=self.folder.path,
            rows=related(rows),
            planned=len(planned),
            task=shared.task.kind,
            initial_sha256=self.start,
            machine={"cores": cores(), "device": name, "system": system},
            versions={
                "visiontrain": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            exit_code=code,
        )

    def _trained(self, mode: Mode, row: Row) -> Row:
        """Fill a row from its run."""
        found = self._attempt(mode.name, lambda: self._measured(mode, row, self._train(mode)))
        return replace(row, error=found) if isinstance(found, str) else found

    def _attempt(self, what: str, action: Callable[[], T]) -> T | str:
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

    def _train(self, mode: Mode) -> int:
        """Train what is not trained yet; return the exit code."""
        folder = self._folder_of(mode)
        goes_on = folder.config.is_file()
        run = run_of(self.config, mode, str(folder.path), resume=goes_on)
        if goes_on and _is_complete(folder, config_sha256(settled(run))):
            self.say(f"complete already: {folder.path}")
            return 0
        return commands.train(run)[1]

    def _measured(self, mode: Mode, row: Row, code: int) -> Row:
        """Fill a row from a run that ended with exit code `code`."""
        if code:
            raise Halt(self.stopped() or code)
        metrics = _read(self._folder_of(mode).metrics)
        began = metrics["initial_sha256"]
        if began != self.start:
            raise CheckpointError(
                f"weights: {mode.name} began with {began[:16]}, not with {self.start[:16]} as the "
                "others; compare in a new folder"
            )
        return measured(row, metrics)

    def _folder_of(self, mode: Mode) -> RunFolder:
        return RunFolder(self.folder.path / mode.name)

    # -- how exact ------------------------------------------------------------------

    def _checked(self, mode: Mode, row: Row) -> Row:
        """Add how exact the mode is."""
        if row.error:
            return row
        if isinstance(mode.strategy, Single):
            return replace(row, exactness="control")
        if not self.config.check:
            return row
        what = f"measuring how exact {mode.name} is"
        found = self._attempt(what, lambda: self._exactness(mode, row.config_sha256))
        if isinstance(found, str):
            return replace(row, reasons=found.splitlines()[:1])
        reasons, steps = found["reasons"], found["steps"]
        return replace(row, exactness=found["verdict"], reasons=reasons, check_steps=steps)

    def _exactness(self, mode: Mode, config: str | None) -> Tree:
        """Measure one mode against one device, or take what its parity.json says."""
        path = self._folder_of(mode).path / PARITY
        of: Tree = {"config_sha256": config, "steps": self.config.check_steps}
        found = _read(path) if path.is_file() else {}
        if not of.items() <= found.items():
            found = of | self._parity(mode)
            with storing(path):
                replace_file(path, to_json(found))
        return found

    def _parity(self, mode: Mode) -> Tree:
        """Measure one mode against one device."""
        self.say(f"how exact {mode.name} is, over {self.config.check_steps} steps in {PRECISION}")
        run = run_of(self.config, mode, None)
        report = commands.parity(run, self.config.check_steps, (PRECISION,), self.controls)
        checks = [asdict(check) for check in report.checks]
        return {"verdict": report.verdict, "reasons": list(report.reasons), "checks": checks}


def _is_complete(folder: RunFolder, config: str) -> bool:
    """Tell whether a run under this config, given by its sha256, came to its end there."""
    return folder.metrics.is_file() and _read(folder.metrics).get("config_sha256") == config


def _read(path: Path) -> Tree:
    """Read a JSON file of ours, which is whole or absent."""
    return json.loads(path.read_text(encoding="utf-8"))
