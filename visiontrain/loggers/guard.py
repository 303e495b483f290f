"""Guarded: keeps a logger's failure from stopping the training it reports on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from visiontrain.core.interfaces import Logger

_warn = logging.getLogger(__name__).warning


class Guarded:
    """A logger that is switched off, with one warning, the first time it fails."""

    def __init__(self, logger: Logger) -> None:
        self.logger = logger
        self.name = logger.name
        self.on = True
        self._closed = False
        self._state: dict[str, Any] = {}

    def start(self, config: Mapping[str, Any], out: Path) -> None:
        self._try(lambda: self.logger.start(config, out))

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._try(lambda: self.logger.log(row, step))

    def image(self, name: str, path: Path, step: int) -> None:
        self._try(lambda: self.logger.image(name, path, step))

    def state(self) -> dict[str, Any]:
        """Return the logger's state; after it failed, the one before it did."""
        return dict(self._state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        if not state:  # it failed before it had any: it starts anew
            return
        self._state = dict(state)
        self._try(lambda: self.logger.load_state(state))

    def close(self, *, exit_code: int = 0) -> None:
        if self._closed:  # as after an error while closing
            return
        self._closed = True
        if self.on:
            self._try(lambda: self.logger.close(exit_code=exit_code))
            self.on = False
            return
        with suppress(Exception):  # it failed, and was told; what it holds is still to be let go
            self.logger.close(exit_code=exit_code)

    def _try(self, call: Callable[[], None]) -> None:
        if not self.on:
            return
        try:
            call()
            state = self.logger.state()
            json.dumps(state)  # a checkpoint holds it
            self._state = state or {}  # None of methods that only pass
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            self.on = False
            reason = " ".join(str(error).split()) or "no reason given"
            _warn(
                "log.to=%s: %s: %s; switched off, training goes on",
                self.name,
                type(error).__name__,
                reason,
            )
