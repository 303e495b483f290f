"""The server's program that Flower starts: it carries messages between training and clients.

Training runs in the process that the user started; Flower gives its `Grid` to a process of its own.
The two talk through a socket in a folder that nobody else may enter, in JSON and raw bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from visiontrain.core.errors import RankError, Stopped
from visiontrain.strategies.federated.engine import Answer, Bytes

POLL_S = 0.2


class Reached(Protocol):
    """Whom messages go to; see `flower.Clients`."""

    def find(self, count: int, seconds: float) -> list[int]:
        """Wait for clients; return who is there."""
        ...

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients."""
        ...


def carry(reach: Callable[[Sequence[str]], Reached], link: Connection) -> None:
    """Do what training asks for until it says that it is over.

    Args:
        reach: makes whom messages go to, of the clients' keys.
        link: to the process that trains.
    """
    clients = reach(receive(link)["keys"])
    while (asked := receive(link))["do"] != "end":
        seconds = float(asked["seconds"])
        if asked["do"] == "find":
            send(link, {"clients": clients.find(int(asked["count"]), seconds)})
            continue
        messages = receive_messages(link, asked["clients"])
        found = clients.ask(messages, seconds, int(asked["enough"]))
        good = {client: answer for client, answer in found.items() if not isinstance(answer, str)}
        said = {client: answer for client, answer in found.items() if isinstance(answer, str)}
        send(link, {"clients": list(good), "said": [[k, text] for k, text in said.items()]})
        for answer in good.values():
            link.send_bytes(answer.data)


def send(link: Connection, what: Mapping[str, Any]) -> None:
    """Say something."""
    link.send_bytes(json.dumps(what).encode())


def receive(link: Connection) -> dict[str, Any]:
    """Listen."""
    return json.loads(link.recv_bytes())


def receive_messages(link: Connection, clients: Sequence[int]) -> dict[int, Bytes]:
    """Take as many messages as there are clients."""
    return {client: np.frombuffer(link.recv_bytes(), np.uint8) for client in clients}


class Relayed:
    """Training's end of it."""

    def __init__(self, link: Connection, keys: Sequence[str], stopping: Callable[[], bool]) -> None:
        self._link, self._stopping = link, stopping
        self._open: list[str] = []  # what was asked for and not answered yet
        send(link, {"keys": list(keys)})

    def find(self, count: int, seconds: float) -> list[int]:
        """Wait until so many clients are there; return those that are when the time is up."""
        return self._told({"do": "find", "count": count, "seconds": seconds}, ())["clients"]

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients; see `Engine.ask`."""
        asked = {"do": "ask", "clients": list(messages), "seconds": seconds, "enough": enough}
        told = self._told(asked, messages.values())
        found: dict[int, Answer] = dict(receive_messages(self._link, told["clients"]))
        return found | {int(client): str(text) for client, text in told["said"]}

    def _told(self, asked: Mapping[str, Any], messages: Iterable[Bytes]) -> dict[str, Any]:
        """Ask for something; answers that nobody waited for come first, and are dropped.

        Raises:
            Stopped: this process was asked to stop.
            RankError: the other process has ended.
        """
        try:
            send(self._link, asked)
            for message in messages:
                self._link.send_bytes(message.data)
            self._open.append(asked["do"])
            while True:
                while not self._link.poll(POLL_S):
                    if self._stopping():
                        raise Stopped
                told, did = receive(self._link), self._open.pop(0)
                if not self._open:
                    return told
                if did == "ask":
                    receive_messages(self._link, told["clients"])
        except (EOFError, OSError) as error:
            raise RankError(
                "strategy: federated; Flower's server process ended; everything up to the last "
                "round is saved"
            ) from error

    def end(self) -> None:
        """Say that it is over, if anybody listens."""
        try:
            send(self._link, {"do": "end"})
        except OSError:
            return
