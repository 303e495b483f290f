"""LOGGERS: everywhere numbers can go, by name."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from rich.console import Console

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Logger, Progress
from visiontrain.core.own import Own
from visiontrain.loggers.config import LogConfig
from visiontrain.loggers.console import ConsoleProgress, PlainProgress, Silent, is_plain
from visiontrain.loggers.csv import CsvLogger
from visiontrain.loggers.function import FunctionLogger
from visiontrain.loggers.guard import Guarded
from visiontrain.loggers.tensorboard import TensorboardLogger
from visiontrain.loggers.wandb import WandbLogger

LOGGERS: dict[str, Callable[[LogConfig], Logger]] = {
    "csv": lambda config: CsvLogger(),  # noqa: ARG005 - one signature for all
    "tensorboard": lambda config: TensorboardLogger(),  # noqa: ARG005 - one signature for all
    "wandb": WandbLogger,
}


def build_loggers(config: LogConfig) -> list[Logger]:
    """Make the loggers of `log.to`, results.csv first; each is switched off when it fails.

    Call it on the main process only. `console` is a Progress: see `build_progress`.

    Raises:
        ConfigError: when a logger's package is not installed.
    """
    names = ["csv", *(name for name in dict.fromkeys(config.to) if name != "console")]
    loggers = [LOGGERS[name](config) for name in names]
    if config.own is not None:
        loggers.append(own_logger(config.own))
    return [Guarded(logger) for logger in loggers]


def own_logger(own: Own) -> Logger:
    """Return a logger of the user's: an object with all verbs, or a function of (row, step).

    Raises:
        ConfigError: it is neither, or has a name that is taken.
    """
    if isinstance(own.value, Logger) and isinstance(getattr(own.value, "name", None), str):
        if own.value.name in LOGGERS:  # a checkpoint keeps each one's state under its name
            raise ConfigError(
                f"logger: {own.ref} has the name {own.value.name!r}, as one of visiontrain's; "
                "give it another"
            )
        return own.value
    if callable(own.value):
        return FunctionLogger(own.value)
    raise ConfigError(
        f"logger: {own.ref}; pass a function of (row, step), or an object with the methods of "
        "visiontrain.Logger and a name"
    )


def lose_stdout() -> None:
    """Let what is printed from here on go nowhere, also what Python flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lasting(Console):
    """A terminal or pipe that may go away: the run goes on, its record is results.csv."""

    def on_broken_pipe(self) -> None:
        """Write no more, instead of ending the program as rich does."""
        self.quiet = True
        lose_stdout()


def build_progress(config: LogConfig) -> Progress:
    """Make what a person watches: live bars on a terminal, plain lines elsewhere, or nothing."""
    if "console" not in config.to:
        return Silent()
    console = Lasting(highlight=False)
    return PlainProgress(console) if is_plain(console) else ConsoleProgress(console)
