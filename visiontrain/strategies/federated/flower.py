"""Messages over Flower: bytes of ours in records of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from visiontrain.core.errors import VisiontrainError
from visiontrain.strategies.federated.engine import Answer
from visiontrain.strategies.tensor_message import Bytes

logging.getLogger("flwr").setLevel(logging.ERROR)
POLL_S = 0.1
DIED = "ActorDiedError"  # in what Ray says, with a page about it
ARRAYS, SAID, ERROR, NUMBER = "arrays", "said", "error", "partition-id"


class Clients:
    """The clients of a run, as the server reaches them."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._nodes: dict[int, int] = {}  # client: Flower's number of it, which is random

    def find(self, count: int, seconds: float) -> list[int]:
        """Wait until so many are there; return those that are when the time is up."""
        end = time.monotonic() + seconds
        while len(nodes := list(self._grid.get_node_ids())) < count and time.monotonic() < end:
            time.sleep(POLL_S)
        asked = {node: RecordDict() for node in nodes}
        found = self._exchange(asked, "query", max(1.0, end - time.monotonic()), len(asked))
        self._nodes = {}
        for node, reply in sorted(found.items()):
            number = number_in(reply)
            if number is not None:
                self._nodes.setdefault(number, node)
        return sorted(self._nodes)

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients; see `Engine.ask`."""
        clients = {self._nodes[client]: client for client in messages}
        asked = {node: record_of(messages[client]) for node, client in clients.items()}
        found = self._exchange(asked, "train", seconds, enough)
        return {clients[node]: answer_in(reply) for node, reply in found.items()}

    def _exchange(
        self, asked: Mapping[int, RecordDict], kind: str, seconds: float, enough: int
    ) -> dict[int, Message]:
        """Send, and collect until enough have answered or the time is up."""
        end, found = time.monotonic() + seconds, dict[int, Message]()
        waiting = set(
            self._grid.push_messages(
                [Message(record, node, kind, ttl=seconds + 60) for node, record in asked.items()]
            )
        )
        good = 0
        while waiting and good < enough and time.monotonic() < end:
            for reply in self._grid.pull_messages(waiting):
                found[reply.metadata.src_node_id] = reply
                waiting.discard(reply.metadata.reply_to_message_id)
                good += not isinstance(answer_in(reply), str)
            time.sleep(POLL_S)
        return found


def record_of(message: Bytes) -> RecordDict:
    """Put bytes into a record."""
    return RecordDict({ARRAYS: ArrayRecord({SAID: Array(message)})})


def bytes_in(record: RecordDict) -> Bytes:
    """Take bytes (N,) out of a record.

    Raises:
        ValueError: there is something else in it.
    """
    found = cast("Array", record[ARRAYS][SAID]).numpy()
    if found.dtype != np.uint8 or found.ndim != 1:
        raise ValueError(f"{found.dtype} {found.shape} instead of bytes")
    return found


def number_in(reply: Message) -> int | None:
    """Return the number that a client says it has; None where it says none."""
    if reply.has_error():
        return None
    try:
        number = reply.content[SAID][NUMBER]
    except (KeyError, TypeError):
        return None
    return number if isinstance(number, int) else None


def answer_in(reply: Message) -> Answer:
    """Return what a client answers, or why it does not."""
    if reply.has_error():
        reason = reply.error.reason or f"Flower's error {reply.error.code}"
        if DIED in reason:
            return "its process ended without a word; was it killed?"
        return reason.splitlines()[0]
    if SAID in reply.content:
        said = reply.content[SAID]
        return str(said[ERROR]) if ERROR in said else ""
    try:
        return bytes_in(reply.content)
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, MemoryError) as error:
        return f"an answer that is none ({type(error).__name__})"


def client_app(answer: Callable[[Bytes, Context], Bytes]) -> ClientApp:
    """Make Flower's side of a client.

    Args:
        answer: to a message.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config[NUMBER])
        return Message(RecordDict({SAID: ConfigRecord({NUMBER: number})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        try:
            content = record_of(answer(bytes_in(message.content), context))
        except (VisiontrainError, ValueError) as error:
            content = RecordDict({SAID: ConfigRecord({ERROR: str(error)})})
        return Message(content, reply_to=message)

    return app


def number_of(context: Context) -> int:
    """Return a client's number."""
    return int(context.node_config[NUMBER])
