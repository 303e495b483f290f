"""Calls of the driver to hub and servers, during which it sees to whatever dies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from visiontrain.strategies.parameter_server.engine import Answer, Engine, Event, ServerEnded

POLL_S = 1.0  # between looks for workers that hang


class LostServerError(Exception):
    """A server died while it was asked; another is in its place now."""


class Calls:
    """The driver's, one at a time."""

    def __init__(self, engine: Engine, see_to: Callable[[Event], None]) -> None:
        """Call through an engine.

        Args:
            engine: what reaches them.
            see_to: is told of processes that ended meanwhile, and now and then of nothing.
        """
        self.engine, self.see_to = engine, see_to
        self.ended: Counter[int] = Counter()  # how often each server did

    def hub(self, method: str, *values: Any) -> Any:
        """Call the hub."""
        call = self.engine.hub(method, *values)
        while True:
            event = self.engine.wait(call, POLL_S)
            if isinstance(event, Answer):
                return event.value
            self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, ServerEnded):
            self.ended[event.number] += 1
        self.see_to(event)

    def server(self, number: int, method: str, *values: Any) -> Any:
        """Call a server.

        Raises:
            LostServerError: it died; there is another in its place.
        """
        call, before = self.engine.server(number, method, *values), self.ended[number]
        while True:
            event = self.engine.wait(call, POLL_S)
            if isinstance(event, Answer):
                return event.value
            self._note(event)
            if self.ended[number] != before:
                raise LostServerError

    def insist(self, number: int, method: str, *values: Any) -> Any:
        """Call a server, and whatever comes in its place, until it answers."""
        while True:
            try:
                return self.server(number, method, *values)
            except LostServerError:
                continue
