"""Messages over Flower: bytes of ours in records of its own."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from visiontrain.core.errors import VisiontrainError
from visiontrain.strategies.federated.engine import Answer, Bytes

logging.getLogger("flwr").setLevel(logging.ERROR)
POLL_S = 0.1
BEGINNING = 1 << 16  # bytes of a message that are looked at
SPARE_S = 600.0  # that a message lives longer than its reply is waited for twice
GONE = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)  # it was too old
DIED = "ActorDiedError"  # in what Ray says, with a page about it
LONGEST = 300  # letters of what a client says of itself
ARRAYS, SAID, ERROR, NUMBER = "arrays", "said", "error", "partition-id"


@dataclass(frozen=True, slots=True)
class Request:
    """A message that a client is to get."""

    record: RecordDict
    what: str = ""  # as in `Sent`

    @classmethod
    def of(cls, message: Bytes, client: int) -> Request:
        """Make one of bytes."""
        return cls(
            record_of(message, client), hashlib.sha256(message[:BEGINNING].tobytes()).hexdigest()
        )


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that a client has."""

    name: str  # Flower's
    what: str  # digest of its beginning, which says of which round it is
    since: str  # when the client came that has it


class Clients:
    """The clients of a run, as the server reaches them."""

    def __init__(
        self,
        grid: Grid,
        keys: Sequence[bytes] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Reach them.

        Args:
            grid: Flower's.
            stopping: as for `Engine.open`.
            keys: of the clients, in PEM, which are numbered in this order; without, they say
                themselves which number they have.
        """
        self._grid, self._keys, self._stopping = grid, keys, stopping
        self._nodes: dict[int, int] = {}  # client: Flower's number of it, which is random
        self._open: dict[int, Sent] = {}  # by node: what it has not answered
        self._since: dict[int, str] = {}  # by node: when it came

    def find(self, count: int, seconds: float) -> list[int]:
        """Wait until so many are there; return those that are when the time is up."""
        end = time.monotonic() + seconds
        while len(nodes := list(self._grid.get_nodes())) < count and time.monotonic() < end:
            time.sleep(POLL_S)
        self._nodes = {}
        # A node keeps its number when it comes back, and knows nothing of what it was sent before.
        self._since = {node.node_id: str(node.last_activated_at) for node in nodes}
        self._open = {
            node: sent for node, sent in self._open.items() if self._since.get(node) == sent.since
        }
        if self._keys is not None:
            number = {key: k for k, key in enumerate(self._keys)}
            known = {number[n.public_key]: n.node_id for n in nodes if n.public_key in number}
            self._nodes = dict(sorted(known.items()))
            return list(self._nodes)
        asked = {node.node_id: Request(RecordDict()) for node in nodes}
        found = self._exchange(asked, "query", max(1.0, end - time.monotonic()), len(asked))
        for node, reply in sorted(found.items()):
            said = number_in(reply)
            if said is not None:
                self._nodes.setdefault(said, node)
        return sorted(self._nodes)

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients; see `Engine.ask`."""
        clients = {self._nodes[k]: k for k in messages if k in self._nodes}
        asked = {node: Request.of(messages[client], client) for node, client in clients.items()}
        found = self._exchange(asked, "train", seconds, min(enough, len(asked)))
        gone: dict[int, Answer] = {k: "is not there" for k in messages if k not in self._nodes}
        return {clients[node]: answer_in(reply) for node, reply in found.items()} | gone

    def _exchange(
        self, asked: Mapping[int, Request], kind: str, seconds: float, enough: int
    ) -> dict[int, Message | str]:
        """Send, and collect until enough have answered or the time is up.

        A client does one thing after the other, and what it was sent cannot be taken back. So who
        is still at an earlier message gets no other one until that is answered, or too old; asked
        for the same again, it only has to finish.

        Whose a reply is says the message that it is to: what a reply says of itself was written by
        a client, or by Flower's link where a node has left.
        """
        end, found = time.monotonic() + seconds, dict[int, Message | str]()
        waiting = dict(asked)  # those that have to answer
        good = 0
        while waiting and good < enough and time.monotonic() < end and not self._stopping():
            found |= self._send(waiting, kind, 2 * seconds + SPARE_S)
            for node in list(waiting):
                sent = self._open.get(node)
                reply = None if sent is None else self._reply(sent.name)
                if sent is None or reply is None:
                    continue
                del self._open[node]
                if sent.what == waiting[node].what and not is_gone(reply):
                    found[node] = reply
                    good += not isinstance(answer_in(reply), str)
            waiting = {node: each for node, each in waiting.items() if node not in found}
            time.sleep(POLL_S)
        return found

    def _send(
        self, waiting: Mapping[int, Request], kind: str, ttl: float
    ) -> dict[int, Message | str]:
        """Send what is waited for to those that are free; return whom Flower's link refused."""
        free = {node: each for node, each in waiting.items() if node not in self._open}
        if not free:
            return {}
        messages = [Message(each.record, node, kind, ttl=ttl) for node, each in free.items()]
        told = dict(zip(free, self._grid.push_messages(messages), strict=False))
        for node, each in free.items():
            if told.get(node):
                self._open[node] = Sent(told[node], each.what, self._since.get(node, ""))
        return {node: "Flower's link took no message" for node in free if not told.get(node)}

    def _reply(self, name: str) -> Message | str | None:
        """Return the reply to a message, if there is one, or why it cannot be read."""
        try:
            return next(iter(self._grid.pull_messages([name])), None)
        except Exception as error:  # noqa: BLE001 - a client wrote it, Flower reads it
            return f"an answer that is none ({type(error).__name__})"


def record_of(message: Bytes, number: int | None = None) -> RecordDict:
    """Put bytes into a record, and the number of the client that they are for."""
    record = RecordDict({ARRAYS: ArrayRecord({SAID: Array(message)})})
    if number is not None:
        record[SAID] = ConfigRecord({NUMBER: number})
    return record


def bytes_in(record: RecordDict) -> Bytes:
    """Take bytes (N,) out of a record.

    Raises:
        ValueError: there is something else in it.
    """
    found = cast("Array", record[ARRAYS][SAID]).numpy()
    if found.dtype != np.uint8 or found.ndim != 1:
        raise ValueError(f"{found.dtype} {found.shape} instead of bytes")
    return found


def is_gone(reply: Message | str) -> bool:
    """Tell whether Flower says that a message is not there any more."""
    return not isinstance(reply, str) and reply.has_error() and reply.error.code in GONE


def number_in(message: Message | str) -> int | None:
    """Return the client's number in a message; None where there is none."""
    if isinstance(message, str) or message.has_error():
        return None
    try:
        number = message.content[SAID][NUMBER]
    except Exception:  # noqa: BLE001 - a client wrote it, Flower reads it
        return None
    return number if isinstance(number, int) else None


def answer_in(reply: Message | str) -> Answer:
    """Return what a client answers, or in a short line why it does not."""
    if isinstance(reply, str):
        return reply
    try:
        return _content(reply)
    except Exception as error:  # noqa: BLE001 - a client wrote it, Flower and numpy read it
        return f"an answer that is none ({type(error).__name__})"


def _content(reply: Message) -> Answer:
    if reply.has_error():
        reason = reply.error.reason or f"Flower's error {reply.error.code}"
        if DIED in reason:
            return "its process ended without a word; was it killed?"
        return short(reason)
    if SAID in reply.content:
        said = reply.content[SAID]
        return short(str(said[ERROR])) if ERROR in said else "an answer that is none"
    return bytes_in(reply.content)


def short(text: str) -> str:
    """Return what fits into a line of a person's terminal, without what would steer that."""
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable())[:LONGEST] or "no reason given"


def client_app(answer: Callable[[Bytes, int], Bytes]) -> ClientApp:
    """Make Flower's side of a client.

    Args:
        answer: to a message, for the client with a number.
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        number = int(context.node_config[NUMBER])
        return Message(RecordDict({SAID: ConfigRecord({NUMBER: number})}), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        del context
        try:
            number = int(cast("int", message.content[SAID][NUMBER]))
            content = record_of(answer(bytes_in(message.content), number))
        except (VisiontrainError, ValueError, KeyError) as error:
            content = RecordDict({SAID: ConfigRecord({ERROR: str(error)})})
        return Message(content, reply_to=message)

    return app
