"""One end of a slow link, for `visiontrain.slow_links`: a rank, or a federated server or client.

Federated messages are those of the mode, made and read by its own server and clients; here plain
sockets carry them, since a simulation of Flower's keeps to one machine.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from visiontrain import app, worker
from visiontrain.core.types import Place
from visiontrain.data.open import open_dataset
from visiontrain.engine.optim import Schedule
from visiontrain.engine.step import train_step
from visiontrain.loggers.console import Silent
from visiontrain.recipe import Run
from visiontrain.slow_links import FEDERATED, Row, Timing, timed
from visiontrain.start import build_fresh
from visiontrain.strategies import launch, speeds
from visiontrain.strategies.config import DDP
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.federated.engine import Answer
from visiontrain.strategies.federated.messages import read_meta
from visiontrain.strategies.federated.server import Server
from visiontrain.strategies.links import Link, Network
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.speeds import EVERY, Work
from visiontrain.strategies.tensor_message import Bytes
from visiontrain.tasks.registry import as_task

PORT = 29_600
PATIENCE_S = 120.0
CPU = torch.device("cpu")


class Sockets:
    """What carries a server's messages: one connection to each client."""

    joins = False

    def __init__(self, address: str, clients: int) -> None:
        self.at_once, self._address = clients, address
        self._connections: dict[int, socket.socket] = {}
        self.trained: list[float] = []  # of each round: seconds of its slowest client, by its clock

    def open(self, stopping: Callable[[], bool]) -> None:
        """Wait for all clients."""
        del stopping
        with socket.create_server((self._address, PORT)) as listener:
            listener.settimeout(PATIENCE_S)
            while len(self._connections) < self.at_once:
                connection, _ = listener.accept()
                connection.settimeout(None)
                self._connections[int(received(connection)[0])] = connection

    def clients(self, count: int, seconds: float) -> list[int]:
        """Return their numbers."""
        del count, seconds
        return sorted(self._connections)

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Send all of them their messages at once, and wait for all."""
        del seconds, enough
        answers: dict[int, Answer] = {}

        def talk(client: int, message: Bytes) -> None:
            connection = self._connections[client]
            send(connection, message)
            answers[client] = received(connection)

        threads = [threading.Thread(target=talk, args=pair) for pair in messages.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metas = [read_meta(answer) for answer in answers.values() if not isinstance(answer, str)]
        trained = [meta["seconds"] for meta in metas if "seconds" in meta]
        self.trained += [max(trained)] if trained else []
        return answers

    def close(self) -> None:
        """Hang up: clients end."""
        for connection in self._connections.values():
            connection.close()


def send(connection: socket.socket, message: Bytes) -> None:
    """Send a message, its length before it."""
    connection.sendall(len(message).to_bytes(8, "big"))
    connection.sendall(message.data)


def received(connection: socket.socket) -> Bytes:
    """Read a message.

    Raises:
        ConnectionError: the other end hung up.
    """
    size = int.from_bytes(_exactly(connection, 8).tobytes(), "big")
    return _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> Bytes:
    data = np.empty(size, np.uint8)
    view, got = memoryview(data.data), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if not count:
            raise ConnectionError("the other end hung up")
        got += count
    return data


def rank(job: dict[str, Any]) -> None:
    """Be a rank of a group of both ends."""
    launch.run(DDP(threads=1), "cpu", timed, json.dumps(job))


def serve(job: dict[str, Any]) -> None:
    """Be the federated server: time rounds, and print the row."""
    run, timing = Run.model_validate_json(job["run"]), Timing(**job["timing"])
    config = run.strategy
    assert isinstance(config, Federated)
    place, engine = Place(CPU), Sockets(job["address"], config.clients)
    remote = app.remote_of(run, place)
    strategy = Server(place, Precision(run.precision, CPU), config, engine, remote)
    spec = open_dataset(run.data, run.task.kind)
    table = spec.cut(as_task(spec.table("train"), run.task))
    remote.tell(spec.names, len(table), table.digest())
    schedule = Schedule(run.optim, run.epochs, len(table), run.batch)
    model = build_fresh(run, spec.names, Silent())
    learner = app.build_learner(run, model, spec.names, schedule, strategy)
    rounds = []
    with strategy.running():
        for _ in range(timing.first + timing.values):
            began = time.perf_counter()
            train_step(learner, [], len(table))
            rounds.append((time.perf_counter() - began) / EVERY)
    alone = [seconds / EVERY for seconds in engine.trained]
    network, work = Network(Link(**job["link"])), Work(**job["work"]).at(statistics.median(alone))
    known = speeds.federated(work, network, config.clients, EVERY)
    sent = strategy.bytes_sent / len(rounds) / EVERY
    row = Row(FEDERATED, network.between, alone, rounds[timing.first :], sent, known)
    print(json.dumps(row.as_json()), flush=True)  # noqa: T201 - to the parent


def answer(job: dict[str, Any], number: int) -> None:
    """Be a federated client until the server hangs up."""
    run = Run.model_validate_json(job["run"])
    remote = app.remote_of(run, Place(CPU))
    with _connected(job["address"]) as connection:
        send(connection, np.array([number], np.uint8))
        while True:
            try:
                message = received(connection)
            except ConnectionError:
                return
            send(connection, worker.answer(remote, number, message))


def _connected(address: str) -> socket.socket:
    """Connect to the server, which may still be starting."""
    last = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_connection((address, PORT))
        except ConnectionRefusedError:
            if time.monotonic() > last:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    part, given, *rest = sys.argv[1:]
    if part == "client":
        answer(json.loads(given), int(rest[0]))
    else:
        {"rank": rank, "server": serve}[part](json.loads(given))
