"""Clients of one machine, by Flower's simulation runtime."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from queue import Empty, Queue
from typing import Any

import ray
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from visiontrain.core.errors import RankError
from visiontrain.strategies.environment import cores
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.federated.engine import Answer, Bytes
from visiontrain.strategies.federated.flower import Clients, client_app
from visiontrain.strategies.ray_start import signals_kept, start_ray
from visiontrain.strategies.remote import Remote

START_S, SOON_S, END_S = 120.0, 3.0, 30.0
RETRIES = 1  # of what a client was at when its process died


class Simulation:
    """Runs Flower's simulation beside the training loop; see `Engine`.

    It wants to be called by the main program and to call that back: here it has a thread, and
    hands out what the main program asks clients with.
    """

    def __init__(self, config: Federated, device: torch.device, remote: Remote) -> None:
        self._config, self._remote, self._device = config, remote, device
        self.joins = False
        self.at_once = min(config.clients, config.processes or cores())
        self._threads = config.threads or max(1, cores() // self.at_once)
        self._over = threading.Event()
        self._grids: Queue[Grid | BaseException] = Queue()
        self._thread: threading.Thread | None = None
        self._clients: Clients

    def open(self, stopping: Callable[[], bool]) -> None:
        """Start it; see `Engine`.

        Raises:
            RankError: it does not.
        """
        start_ray(self._config.kind, self.at_once)  # in a thread, it would keep its handlers
        self._thread = threading.Thread(target=self._run, name="flower", daemon=True)
        self._thread.start()
        try:
            found = self._grids.get(timeout=START_S)
        except Empty:
            raise RankError(f"strategy: federated; Flower did not start in {START_S:g} s") from None
        if isinstance(found, BaseException):
            raise RankError(f"strategy: federated; Flower did not start: {found}") from found
        self._clients = Clients(found, stopping=stopping)

    def _run(self) -> None:
        server, over, grids = ServerApp(), self._over, self._grids

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            del context
            grids.put(grid)
            over.wait()

        gpus = torch.cuda.device_count() if self._device.type == "cuda" else 0
        resources: dict[str, Any] = {
            "num_cpus": 1,
            "num_gpus": 1 / math.ceil(self.at_once / gpus) if gpus else 0,
            # Flower takes these for resources, and hands them on: a process that died would be
            # given work for ever.
            "max_restarts": -1,
            "max_task_retries": RETRIES,
        }
        try:
            run_simulation(
                server,
                client_app(Answering(self._remote, self._threads)),
                self._config.clients,
                backend_config={"client_resources": resources},
            )
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            grids.put(error)

    def clients(self, count: int, seconds: float) -> list[int]:
        """Return the clients' numbers."""
        del count  # all of them start with it
        return self._clients.find(self._config.clients, seconds)

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients.

        Raises:
            RankError: Flower's thread has ended.
        """
        if self._thread is None or not self._thread.is_alive():
            raise RankError("strategy: federated; Flower's simulation ended without a word")
        return self._clients.ask(messages, seconds, enough)

    def close(self) -> None:
        """End it, with whatever its clients are at."""
        self._over.set()
        with signals_kept():
            if self._thread is not None:
                self._thread.join(SOON_S)
            ray.shutdown()  # also with a client that is still at work
            if self._thread is not None:
                self._thread.join(END_S)


class Answering:
    """A client's function; travels to the processes that clients are simulated in."""

    def __init__(self, remote: Remote, threads: int) -> None:
        self.remote, self.threads = remote, threads

    def __call__(self, message: Bytes, number: int) -> Bytes:
        """Answer."""
        torch.set_num_threads(self.threads)
        return import_module(self.remote.module).answer(self.remote, number, message)
