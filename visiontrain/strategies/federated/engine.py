"""What carries messages between a federated server and its clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from visiontrain.strategies.tensor_message import Bytes

Answer = Bytes | str  # a message, or why there is none


class Engine(Protocol):
    """Flower's simulation, a deployment, or calls in this process."""

    at_once: int  # clients that can train at the same time

    def open(self) -> None:
        """Start what is needed."""
        ...

    def clients(self, seconds: float) -> list[int]:
        """Return the numbers of the clients that are there, ascending.

        Waits for as many as there are to be, that long at most.
        """
        ...

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Send each of some clients a message; return what came back in time.

        Args:
            messages: by client.
            seconds: until the others are left out.
            enough: messages that are waited for, if not for all.
        """
        ...

    def close(self) -> None:
        """End it all."""
        ...
