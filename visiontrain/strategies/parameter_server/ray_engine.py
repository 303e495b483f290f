"""Hub, servers and workers as actors of Ray."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.exceptions import OutOfMemoryError as KilledForMemoryError

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.config import ParameterServer
from visiontrain.strategies.devices import threads
from visiontrain.strategies.member import describe
from visiontrain.strategies.parameter_server.engine import (
    Answer,
    Event,
    HubEnded,
    ServerEnded,
    WorkerEnded,
)
from visiontrain.strategies.parameter_server.hub import Hub
from visiontrain.strategies.parameter_server.ledger import RULES
from visiontrain.strategies.parameter_server.server import Hosted, Server
from visiontrain.strategies.parameter_server.talk import LOST, LostError
from visiontrain.strategies.ray_start import leave_out_endings, signals_kept, start_ray
from visiontrain.strategies.remote import Remote

# Of what Ray ends where memory is short it raises no RayActorError.
GONE = (RayActorError, ActorUnavailableError, KilledForMemoryError)


def read_only() -> None:
    """Let torch say nothing of arrays in Ray's shared memory: nobody writes into messages."""
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")


class ServerActor:
    """A server's process."""

    def __init__(self, remote: Remote, number: int, hub: Any, folder: str, every: int) -> None:
        torch.set_num_threads(1)
        read_only()

        async def exchange(clock: int, squared: float, era: int) -> float | None:
            return await hub.exchange.remote(clock, number, squared, era)

        def make() -> Server:
            shard = import_module(remote.module).serve(remote, number)
            return Server(shard, exchange, Path(folder), every)

        self.hosted = Hosted(make)

    async def call(self, method: str, *values: Any) -> Any:
        """Call the server."""
        return await self.hosted.call(method, *values)

    async def live(self) -> Any:
        """Go on for ever, or say what went wrong: who waits learns when the process ends."""
        return await self.hosted.live()


class WorkerActor:
    """A worker's process."""

    def run(self, remote: Remote, name: str, hub: Any, threads: int) -> Any:
        """Work to the end; return what went wrong, for the driver to tell."""
        torch.set_num_threads(threads)
        read_only()
        try:
            import_module(remote.module).compute(remote, name, RayLink(hub))
        except BaseException as error:  # noqa: BLE001 - the driver raises it
            return describe(error)
        return None


class RayLink:
    """How a worker reaches the others."""

    def __init__(self, hub: Any) -> None:
        self._hub = hub
        self._servers: dict[int, tuple[int, Any]] = {}

    def hub(self, method: str, *values: Any) -> Any:
        """Call the hub; where it died, wait for the driver to end the run."""
        try:
            return ray.get(getattr(self._hub, method).remote(*values))
        except (ActorDiedError, KilledForMemoryError):
            threading.Event().wait()

    def _server(self, number: int, known: int) -> tuple[int, Any]:
        found = self.hub("server", number, known)
        if found is None:
            raise LostError
        return found

    def tell(self, method: str, *values: Any) -> None:
        """Call the hub without waiting."""
        getattr(self._hub, method).remote(*values)

    def servers(self, method: str, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call servers at once."""
        for n in calls:
            if n not in self._servers:
                self._servers[n] = self._server(n, 0)
        refs = {n: self._servers[n][1].call.remote(method, *v) for n, v in calls.items()}
        answers = {}
        for n, ref in refs.items():
            try:
                answers[n] = ray.get(ref)
            except GONE:
                self._servers[n] = self._server(n, self._servers[n][0])
                answers[n] = LOST
        return answers


class RayEngine:
    """Starts a Ray of its own on this machine, or joins one; see `Engine`."""

    def __init__(self, config: ParameterServer, device: torch.device, remote: Remote) -> None:
        self._config, self._remote = config, remote
        self._gpus = 1 if device.type == "cuda" else 0
        self._hub: Any = None
        self._servers: dict[int, Any] = {}
        self._workers: dict[str, Any] = {}
        # What ends with a process: a worker's name, a server's number, None for the hub.
        self._watched: dict[Any, str | int | None] = {}

    def open(self, rule: str, staleness: int, shares: int) -> None:
        read_only()
        with signals_kept():
            self._join()
        self._hub = actor(Hub).remote(RULES[rule](staleness), shares, self._config.servers)
        self._watch(self._hub.live.remote(), None)

    def _join(self) -> None:
        """Start Ray, or find it.

        Raises:
            ConfigError: there is none at the address, or it wants another token.
        """
        if self._config.address is None:
            start_ray(self._config.kind, 1)
            return
        leave_out_endings()
        try:
            ray.init(address=self._config.address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            raise ConfigError(
                f"strategy.address: {self._config.address}; no Ray answers at such a HOST:PORT, "
                "or it has another token (RAY_AUTH_TOKEN)"
            ) from error

    def start_server(self, number: int) -> None:
        folder = f"{self._remote.scratch}/server-{number}"
        made = actor(ServerActor)
        every = self._config.snapshot_every
        self._servers[number] = made.remote(self._remote, number, self._hub, folder, every)
        self._watch(self._servers[number].live.remote(), number)

    def publish(self, number: int) -> None:
        self._told("put_server", number, self._servers[number])

    def start_worker(self, name: str) -> None:
        made = actor(WorkerActor, num_gpus=self._gpus, scheduling_strategy="SPREAD")
        self._workers[name] = made.remote()
        run = self._workers[name].run
        self._told("join", name)
        count = threads(self._config)
        self._watch(run.remote(self._remote, name, self._hub, count), name)

    def kill_worker(self, name: str) -> None:
        ray.kill(self._workers[name])

    def _told(self, method: str, *values: Any) -> None:
        """Tell the hub, unless it died: `wait` will say so."""
        with suppress(ActorDiedError, KilledForMemoryError):
            ray.get(self.hub(method, *values))

    def hub(self, method: str, *values: Any) -> Any:
        return getattr(self._hub, method).remote(*values)

    def server(self, number: int, method: str, *values: Any) -> Any:
        return self._servers[number].call.remote(method, *values)

    def wait(self, call: Any, seconds: float) -> Event:
        # Those that ended come first: a call to one of them would only say that it failed.
        ended, _ = ray.wait(list(self._watched), num_returns=1, timeout=0)
        ready = ended or ray.wait([call, *self._watched], num_returns=1, timeout=seconds)[0]
        if not ready:
            return None
        if ready[0] in self._watched:
            return self._ended(ready[0])
        try:
            return Answer(ray.get(call))
        except GONE:  # its end has not been told yet
            told, _ = ray.wait(list(self._watched), num_returns=1, timeout=60)
            if not told:
                raise
            return self._ended(told[0])

    def _ended(self, ref: Any) -> Event:
        who = self._watched.pop(ref)
        try:
            report = ray.get(ref)
            if report is None:
                return None  # it went home: the run is over
        except GONE:
            report = None
        if who is None:
            return HubEnded()
        return WorkerEnded(who, report) if isinstance(who, str) else ServerEnded(who, report)

    def _watch(self, ref: Any, who: str | int | None) -> None:
        self._watched = {old: name for old, name in self._watched.items() if name != who}
        self._watched[ref] = who

    def close(self) -> None:
        with signals_kept():
            ray.shutdown()


def actor(made: type, **options: Any) -> Any:
    """Turn a class into an actor's; none is started again by Ray: the driver does that."""
    return ray.remote(made).options(num_cpus=0, max_restarts=0, **options)
