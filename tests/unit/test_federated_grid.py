"""Clients as a server reaches them through Flower's grid: whatever they say of themselves."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's, of click
    from flwr.supercore.task_identity import TaskIdentity

    from visiontrain.strategies.federated import flower


@pytest.fixture(autouse=True)
def identity(monkeypatch):
    """Be a process that Flower gave a task, as messages want."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes 100, 101, ... with keys; replies are made by the message's node."""

    came = "today"

    def __init__(self, replies):
        self.replies, self.sent = replies, {}

    def get_nodes(self):
        keys = [b"a", b"b", b"c", b"stranger"]
        came = {"last_activated_at": self.came}
        return [SimpleNamespace(node_id=100 + k, public_key=q, **came) for k, q in enumerate(keys)]

    def push_messages(self, messages):
        for message in messages:
            self.sent[f"m{message.metadata.dst_node_id}"] = message
        return list(self.sent)

    def pull_messages(self, names):
        (name,) = names
        return self.replies[self.sent[name].metadata.dst_node_id](self.sent[name])


def echo(message):
    return [said(flower.bytes_in(message.content)[::-1].copy(), src=message.metadata.dst_node_id)]


def said(content, src):
    """A reply that says it is from a node."""
    return SimpleNamespace(
        content=flower.record_of(content),
        metadata=SimpleNamespace(src_node_id=src),
        has_error=lambda: False,
    )


def left(message):
    """What Flower's link makes for a node that has left: a reply of its own, from node 1."""
    del message
    error = SimpleNamespace(reason="Node Unavailable\n\x1b[31mred", code=5)
    metadata = SimpleNamespace(src_node_id=1)
    return [SimpleNamespace(error=error, metadata=metadata, has_error=lambda: True)]


def broken(message):
    raise ValueError(f"no reply to {message}")


def forged(message):
    del message
    return [said(np.array([6, 6], np.uint8), src=100)]


def unreadable(data):
    """What Flower's arrays are read from, and numpy fails at in ways of its own."""

    def reply(message):
        array = flower.Array(dtype="uint8", shape=(3,), stype="numpy.ndarray", data=data)
        found = said(np.zeros(1, np.uint8), src=message.metadata.dst_node_id)
        found.content[flower.ARRAYS] = flower.ArrayRecord({flower.SAID: array})
        return [found]

    return reply


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        (unreadable(b"PK\x03\x04garbage"), "an answer that is none (BadZipFile)"),
        (unreadable(npy(b"{'descr': '|u1', (\n")), "an answer that is none (TokenError)"),
        (
            unreadable(npy(b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}" % 10**30)),
            "an answer that is none (OverflowError)",
        ),
        (left, "Node Unavailable [31mred"),
        (broken, "an answer that is none (ValueError)"),
        (forged, [6, 6]),
    ],
)
def test_a_reply_is_whose_message_it_is_to(fault, answer):
    clients = flower.Clients(Grid({100: echo, 101: fault, 102: echo}), [b"a", b"b", b"c"])
    assert clients.find(3, 0.0) == [0, 1, 2]
    asked = {k: np.arange(k + 2, dtype=np.uint8) for k in range(3)}
    found = clients.ask(asked, 5.0, 3 if fault is forged else 2)
    found = {k: v if isinstance(v, str) else list(v) for k, v in found.items()}
    assert found == {0: [1, 0], 1: answer, 2: [3, 2, 1, 0]}


def test_who_left_before_it_was_asked_is_said():
    grid = Grid({100: echo, 101: echo})
    clients = flower.Clients(grid, [b"a", b"b", b"x"])
    assert clients.find(3, 0.0) == [0, 1]
    found = clients.ask({k: np.zeros(1, np.uint8) for k in (0, 2)}, 5.0, 2)
    assert found[2] == "is not there"
    assert list(found[0]) == [0]


class Slow(Grid):
    """Node 100 answers a message when it is told to; what it has been sent is kept in order."""

    def __init__(self):
        super().__init__({})
        self.got, self.answers, self.ready = [], {}, 0

    def get_nodes(self):
        return super().get_nodes()[:1]

    def push_messages(self, messages):
        names = [f"m{len(self.got) + k}" for k in range(len(messages))]
        self.got += messages
        return names

    def pull_messages(self, names):
        (name,) = names
        number = int(name[1:])
        return echo(self.got[number]) if number < self.ready else []


def bytes_of(*values):
    return np.array(values, np.uint8)


def test_who_is_still_busy_is_not_sent_more_and_finishes_what_it_began():
    grid = Slow()
    clients = flower.Clients(grid, [b"a"])
    clients.find(1, 0.0)
    assert clients.ask({0: bytes_of(1, 2)}, 0.25, 1) == {}
    assert clients.ask({0: bytes_of(1, 2)}, 0.25, 1) == {}  # the same round again
    assert len(grid.got) == 1
    grid.ready = 1
    (answer,) = clients.ask({0: bytes_of(1, 2)}, 5.0, 1).values()
    assert list(answer) == [2, 1]
    assert len(grid.got) == 1


def test_an_answer_to_an_earlier_round_only_makes_room_for_the_next():
    grid = Slow()
    clients = flower.Clients(grid, [b"a"])
    clients.find(1, 0.0)
    assert clients.ask({0: bytes_of(1, 2)}, 0.25, 1) == {}
    assert clients.ask({0: bytes_of(3, 4)}, 0.25, 1) == {}
    assert len(grid.got) == 1
    grid.ready = 2
    (answer,) = clients.ask({0: bytes_of(3, 4)}, 5.0, 1).values()
    assert list(answer) == [4, 3]
    assert len(grid.got) == 2


@pytest.mark.parametrize("why", ["left", "came back unseen", "too old"])
def test_who_will_never_answer_is_asked_anew(monkeypatch, why):
    grid = Slow()
    clients = flower.Clients(grid, [b"a"])
    clients.find(1, 0.0)
    assert clients.ask({0: bytes_of(1, 2)}, 0.25, 1) == {}
    if why == "left":
        with monkeypatch.context() as gone:
            gone.setattr(grid, "get_nodes", list)
            clients.find(1, 0.0)
    elif why == "came back unseen":
        grid.came = "tomorrow"
    else:
        grid.ready = 1
        error = SimpleNamespace(reason="too old", code=flower.ErrorCode.MESSAGE_UNAVAILABLE)
        told = SimpleNamespace(error=error, has_error=lambda: True)
        real = grid.pull_messages
        monkeypatch.setattr(grid, "pull_messages", lambda n: [told] if n == ["m0"] else real(n))
    clients.find(1, 0.0)
    assert clients.ask({0: bytes_of(1, 2)}, 0.35, 1) == {}
    assert len(grid.got) == 2
