"""Hub, servers and workers as actors of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.config import ParameterServer
from visiontrain.strategies.devices import threads
from visiontrain.strategies.member import describe
from visiontrain.strategies.parameter_server.engine import (
    Answer,
    Event,
    ServerEnded,
    WorkerEnded,
)
from visiontrain.strategies.parameter_server.hub import Hub
from visiontrain.strategies.parameter_server.ledger import RULES
from visiontrain.strategies.parameter_server.server import Server
from visiontrain.strategies.parameter_server.talk import LOST
from visiontrain.strategies.ray_start import signals_kept, start_ray
from visiontrain.strategies.remote import Remote

GONE = (RayActorError, ActorUnavailableError)


class ServerActor:
    """A server's process."""

    def __init__(self, remote: Remote, number: int, hub: Any, folder: str, every: int) -> None:
        torch.set_num_threads(1)

        async def exchange(clock: int, squared: float, era: int) -> float | None:
            return await hub.exchange.remote(clock, number, squared, era)

        shard = import_module(remote.module).serve(remote, number)
        self.server = Server(shard, exchange, Path(folder), every)

    async def call(self, method: str, *values: Any) -> Any:
        """Call the server."""
        return await getattr(self.server, method)(*values)

    async def live(self) -> None:
        """Go on for ever: who waits for this learns when the process ends."""
        await asyncio.Event().wait()


class WorkerActor:
    """A worker's process."""

    def run(self, remote: Remote, name: str, hub: Any, threads: int) -> Any:
        """Work to the end; return what went wrong, for the driver to tell."""
        torch.set_num_threads(threads)
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
        """Call the hub."""
        return ray.get(getattr(self._hub, method).remote(*values))

    def tell(self, method: str, *values: Any) -> None:
        """Call the hub without waiting."""
        getattr(self._hub, method).remote(*values)

    def servers(self, method: str, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call servers at once."""
        for n in calls:
            if n not in self._servers:
                self._servers[n] = self.hub("server", n, 0)
        refs = {n: self._servers[n][1].call.remote(method, *v) for n, v in calls.items()}
        answers = {}
        for n, ref in refs.items():
            try:
                answers[n] = ray.get(ref)
            except GONE:
                self._servers[n] = self.hub("server", n, self._servers[n][0])
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
        self._watched: dict[Any, str | int] = {}  # what ends with a process: its name or number

    def open(self, rule: str, staleness: int, shares: int) -> None:
        with signals_kept():
            self._join()
        self._hub = actor(Hub).remote(RULES[rule](staleness), shares, self._config.servers)

    def _join(self) -> None:
        """Start Ray, or find it.

        Raises:
            ConfigError: there is none at the address, or it wants another token.
        """
        if self._config.address is None:
            start_ray(self._config.kind, 1)
            return
        try:
            ray.init(address=self._config.address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, RayError) as error:
            raise ConfigError(
                f"strategy.address: {self._config.address}; no Ray answers there, or it has "
                "another token (RAY_AUTH_TOKEN)"
            ) from error

    def start_server(self, number: int) -> None:
        folder = f"{self._remote.scratch}/server-{number}"
        made = actor(ServerActor)
        every = self._config.snapshot_every
        self._servers[number] = made.remote(self._remote, number, self._hub, folder, every)
        self._watch(self._servers[number].live.remote(), number)

    def publish(self, number: int) -> None:
        ray.get(self._hub.put_server.remote(number, self._servers[number]))

    def start_worker(self, name: str) -> None:
        made = actor(WorkerActor, num_gpus=self._gpus, scheduling_strategy="SPREAD")
        self._workers[name] = made.remote()
        run = self._workers[name].run
        ray.get(self._hub.join.remote(name))
        count = threads(self._config)
        self._watch(run.remote(self._remote, name, self._hub, count), name)

    def kill_worker(self, name: str) -> None:
        ray.kill(self._workers[name])

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
        report = None
        with suppress(*GONE):
            report = ray.get(ref)
        return WorkerEnded(who, report) if isinstance(who, str) else ServerEnded(who, report)

    def _watch(self, ref: Any, who: str | int) -> None:
        self._watched = {old: name for old, name in self._watched.items() if name != who}
        self._watched[ref] = who

    def close(self) -> None:
        with signals_kept():
            ray.shutdown()


def actor(made: type, **options: Any) -> Any:
    """Turn a class into an actor's; none is started again by Ray: the driver does that."""
    return ray.remote(made).options(num_cpus=0, max_restarts=0, **options)
