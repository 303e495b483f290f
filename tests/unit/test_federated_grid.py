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

    def __init__(self, replies):
        self.replies, self.sent = replies, {}

    def get_nodes(self):
        keys = [b"a", b"b", b"c", b"stranger"]
        return [SimpleNamespace(node_id=100 + k, public_key=key) for k, key in enumerate(keys)]

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
    error = SimpleNamespace(reason="Node Unavailable\n\x1b[31mred", code=3)
    metadata = SimpleNamespace(src_node_id=1)
    return [SimpleNamespace(error=error, metadata=metadata, has_error=lambda: True)]


def broken(message):
    raise ValueError(f"no reply to {message}")


def forged(message):
    del message
    return [said(np.array([6, 6], np.uint8), src=100)]


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
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
