"""A function of a user's own as a logger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RowFunction = Callable[[Mapping[str, float], int], Any]


class FunctionLogger:
    """Calls a function with the numbers of each epoch."""

    name = "own"

    def __init__(self, function: RowFunction) -> None:
        self.function = function

    def start(self, config: Mapping[str, Any], out: Path) -> None:
        """Nothing to open."""

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Hand the numbers on."""
        self.function(row, step)

    def image(self, name: str, path: Path, step: int) -> None:
        """Take no pictures."""

    def state(self) -> dict[str, Any]:
        """Return nothing: a function keeps no state here."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Nothing to go on with."""

    def close(self, *, exit_code: int = 0) -> None:
        """Nothing to close."""
