"""What starts, reaches and watches the processes of a run, as the driver sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Answer:
    """A call came back."""

    value: Any


@dataclass(frozen=True, slots=True)
class WorkerEnded:
    """A worker is gone, or says why it stopped."""

    name: str
    report: Mapping[str, Any] | None  # as of `member.describe`; none where it was killed


@dataclass(frozen=True, slots=True)
class ServerEnded:
    """A server is gone."""

    number: int
    report: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class HubEnded:
    """The hub is gone, and with it what was known of the work under way."""


Event = Answer | WorkerEnded | ServerEnded | HubEnded | None


class Engine(Protocol):
    """Starts the hub, servers and workers of one run."""

    def open(self, rule: str, staleness: int, shares: int) -> None:
        """Start the hub."""
        ...

    def start_server(self, number: int) -> None:
        """Start a server, or another in its place; the hub is told by the driver."""
        ...

    def start_worker(self, name: str) -> None:
        """Start a worker, or another in its place."""
        ...

    def kill_worker(self, name: str) -> None:
        """Kill a worker that hangs; that it ended is told by `wait`."""
        ...

    def publish(self, number: int) -> None:
        """Tell the hub where a server is, once it holds its weights."""
        ...

    def hub(self, method: str, *values: Any) -> Any:
        """Begin a call of the hub."""
        ...

    def server(self, number: int, method: str, *values: Any) -> Any:
        """Begin a call of a server."""
        ...

    def wait(self, call: Any, seconds: float) -> Event:
        """Wait for a call's answer, or the end of a process; None when the time is up."""
        ...

    def close(self) -> None:
        """End everything that was started."""
        ...
