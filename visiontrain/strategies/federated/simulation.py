"""Clients of one machine, by Flower's simulation runtime."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from importlib import import_module
from queue import Empty, Queue
from typing import Any

import torch

from visiontrain.core.errors import ConfigError, RankError
from visiontrain.strategies.environment import cores
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.federated.engine import Answer
from visiontrain.strategies.federated.flower import Clients, client_app, number_of
from visiontrain.strategies.parameter_server.wire import Bytes
from visiontrain.strategies.remote import Remote

try:
    import ray
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation
except ImportError as error:
    raise ConfigError(
        "strategy: federated needs Flower and Ray; pip install 'visiontrain[federated]'"
    ) from error

LOOPBACK = "127.0.0.1"
STORE_BYTES = 2**30  # shared memory for messages on their way
START_S, END_S = 120.0, 30.0


class Simulation:
    """Runs Flower's simulation beside the training loop; see `Engine`.

    It wants to be called by the main program and to call that back: here it has a thread, and
    hands out what the main program asks clients with.
    """

    def __init__(self, config: Federated, device: torch.device, remote: Remote) -> None:
        self._config, self._remote, self._device = config, remote, device
        self.at_once = min(config.clients, config.processes or cores())
        self._over = threading.Event()
        self._grids: Queue[Grid | BaseException] = Queue()
        self._thread: threading.Thread | None = None
        self._clients: Clients

    def open(self) -> None:
        """Start it.

        Raises:
            RankError: it does not.
        """
        self._thread = threading.Thread(target=self._run, name="flower", daemon=True)
        self._thread.start()
        try:
            found = self._grids.get(timeout=START_S)
        except Empty:
            raise RankError(f"strategy: federated; Flower did not start in {START_S:g} s") from None
        if isinstance(found, BaseException):
            raise RankError(f"strategy: federated; Flower did not start: {found}") from found
        self._clients = Clients(found)

    def _run(self) -> None:
        server, over, grids = ServerApp(), self._over, self._grids

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            del context
            grids.put(grid)
            over.wait()

        gpus = torch.cuda.device_count() if self._device.type == "cuda" else 0
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus / self.at_once}
        start: dict[str, Any] = {
            "num_cpus": self.at_once,
            "_node_ip_address": LOOPBACK,
            "object_store_memory": STORE_BYTES,
            "include_dashboard": False,
            "configure_logging": False,
            "log_to_driver": False,
        }
        try:
            run_simulation(
                server,
                client_app(Answering(self._remote, max(1, cores() // self.at_once))),
                self._config.clients,
                backend_config={"client_resources": resources, "init_args": start},
            )
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            grids.put(error)

    def clients(self, seconds: float) -> list[int]:
        """Return the clients' numbers."""
        return self._clients.find(self._config.clients, seconds)

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients."""
        return self._clients.ask(messages, seconds, enough)

    def close(self) -> None:
        """End it, with whatever its clients are at."""
        self._over.set()
        if self._thread is None:
            return
        self._thread.join(3)
        if self._thread.is_alive():  # a client is still at work
            ray.shutdown()
            self._thread.join(END_S)


class Answering:
    """A client's function; travels to the processes that clients are simulated in."""

    def __init__(self, remote: Remote, threads: int) -> None:
        self.remote, self.threads = remote, threads

    def __call__(self, message: Bytes, context: Any) -> Bytes:
        """Answer."""
        torch.set_num_threads(self.threads)
        return import_module(self.remote.module).answer(self.remote, number_of(context), message)
