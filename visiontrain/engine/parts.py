"""What a trainer is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from visiontrain.core.interfaces import Logger, Progress
from visiontrain.core.types import Outcome
from visiontrain.data.loader import Step
from visiontrain.engine.config import SaveConfig
from visiontrain.engine.evaluate import Evaluation
from visiontrain.engine.learner import Learner
from visiontrain.engine.saving import Saver

StepSource = Callable[[int, frozenset[int]], Iterator[Step]]  # (first step, skipped steps)


class Ending(Enum):
    """Why a pass over the steps ended."""

    COMPLETE = "complete"
    STOPPED = "stopped"  # by a signal
    UNSTABLE = "unstable"  # too many non-finite steps in a row


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How long to train, and when to look, score and save."""

    epochs: int
    steps_per_epoch: int
    save: SaveConfig
    log_every: int = 10  # steps
    evaluate: bool = True  # after every epoch; else after the last only
    patience: int = 0  # epochs without a better score; 0 never stops
    hours: float | None = None
    verb: str = "train"  # of the command that goes on with the run


@dataclass(frozen=True, slots=True)
class Parts:
    """What a trainer works with."""

    learner: Learner
    steps: StepSource
    evaluate: Callable[[Callable[[], bool]], Evaluation]  # takes what tells whether to stop
    finish: Callable[[Outcome], Mapping[str, Path]]  # writes results; pictures by name
    saver: Saver
    loggers: Sequence[Logger]  # none but on the main process
    progress: Progress
    begin: Callable[[], None]  # called when the run has begun, or goes on
    config: Mapping[str, Any]  # the whole config, for the loggers
