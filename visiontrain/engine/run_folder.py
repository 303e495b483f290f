"""The folder of one run: which one it is, and what lies where inside it."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from visiontrain.core.durable import replace_file, storing, to_json
from visiontrain.core.errors import ConfigError

LOCK = ".lock"  # held while a run goes on in the folder
_log = logging.getLogger(__name__).warning


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run. Scripts rely on these names."""

    path: Path

    @property
    def config(self) -> Path:
        """The whole resolved config; `visiontrain train config.yaml` repeats the run."""
        return self.path / "config.yaml"

    @property
    def results(self) -> Path:
        """A row of numbers per epoch."""
        return self.path / "results.csv"

    @property
    def metrics(self) -> Path:
        """The final numbers."""
        return self.path / "metrics.json"

    @property
    def stages(self) -> Path:
        """What was measured of the model, where a pipeline's stages were chosen by it."""
        return self.path / "stages.txt"

    @property
    def best(self) -> Path:
        """The weights with the best score."""
        return self.path / "weights" / "best.safetensors"

    @property
    def last(self) -> Path:
        """The weights after the last epoch."""
        return self.path / "weights" / "last.safetensors"

    @property
    def clients(self) -> Path:
        """What simulated clients of a federated run keep for themselves."""
        return self.path / "clients"

    @property
    def servers(self) -> Path:
        """Snapshots of parameter servers, while a run goes on."""
        return self.path / "servers"

    @property
    def checkpoints(self) -> Path:
        """Everything resume needs."""
        return self.path / "checkpoints"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training into this folder; a process that ends lets go.

        Where the file system knows no locks, nothing is kept from anybody.

        Raises:
            ConfigError: another process holds it.
            StorageError: nothing can be written there.
        """
        with storing(self.path):
            opened = (self.path / LOCK).open("w")
        with opened as file:
            try:
                # Not flock: loaders, which are forks, would hold on to it a while longer.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise ConfigError(
                    f"out: {self.path} is in use by another run; wait for it, or name another"
                ) from None
            except OSError as error:
                _log("%s: cannot be locked, %s", self.path, error.strerror)
            yield

    def discard_unused(self) -> None:
        """Remove a folder in which a run left nothing but its config; one that held more stays."""
        try:
            if {child.name for child in self.path.iterdir()} <= {self.config.name, LOCK}:
                self.config.unlink(missing_ok=True)
                (self.path / LOCK).unlink(missing_ok=True)
                self.path.rmdir()
        except OSError as error:  # the run's own error says more
            _log("%s: left behind, %s", self.path, error)

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json, whole or not at all.

        Raises:
            StorageError: when it cannot be written.
        """
        with storing(self.metrics):
            replace_file(self.metrics, to_json(metrics))


def claim(out: str | None, parent: Path, name: str, *, resumable: bool = False) -> RunFolder:
    """Create the folder of a new run: `out`, or `parent/name`, numbered when taken.

    `resumable` only says what to advise where `out` is taken.

    Raises:
        ConfigError: when `out` exists and holds something, or is a file.
        StorageError: when it cannot be created.
    """
    if out is not None:
        folder = home(out)
        with storing(folder):
            if folder.is_dir() and not _is_empty(folder):
                advice = "add resume=true to go on with its run, or " if resumable else ""
                raise ConfigError(f"out: {out} is not empty; {advice}name another folder")
            if folder.exists() and not folder.is_dir():
                raise ConfigError(f"out: {out} is a file; name a folder")
            folder.mkdir(parents=True, exist_ok=True)
        return RunFolder(folder)
    for number in count(1):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            with storing(folder.parent):
                folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            continue  # taken, perhaps this very moment by another run
        return RunFolder(folder)
    raise AssertionError  # count() never ends


def reopen(out: str | None) -> RunFolder:
    """Return the folder of the run to go on with; a run killed at once left it empty.

    Raises:
        ConfigError: when `out` is not given or holds no run.
    """
    if out is None:
        raise ConfigError("resume: true without a folder; add out=DIR, the folder of the run")
    folder = RunFolder(home(out))
    with storing(folder.path):
        if not folder.config.is_file() and not (folder.path.is_dir() and _is_empty(folder.path)):
            raise ConfigError(f"out: {out} holds no config.yaml; leave resume away to start there")
    return folder


def home(path: str) -> Path:
    """Return a path whose ~ is the user's folder, as shells write it that do not after `=`."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises where there is none


def _is_empty(path: Path) -> bool:
    """Tell whether nothing is there but files that were being written when a run was killed."""
    return all(child.name.startswith(".") for child in path.iterdir())
