"""What carries messages between a federated server and its clients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]  # (N,)
Answer = Bytes | str  # a message, or why there is none


class Engine(Protocol):
    """Flower's simulation, a deployment, or calls in this process."""

    at_once: int  # clients that can train at the same time
    joins: bool  # whether clients may come and go while a run goes on

    def open(self, stopping: Callable[[], bool]) -> None:
        """Start what is needed.

        Args:
            stopping: asked while clients are waited for; where it says so, that ends early.
        """
        ...

    def clients(self, count: int, seconds: float) -> list[int]:
        """Return the numbers of the clients that are there, ascending.

        Waits for so many, that long at most.
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
