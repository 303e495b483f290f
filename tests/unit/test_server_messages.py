"""What travels between workers and servers: messages, encodings, parts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontrain.strategies.parameter_server.encoding import Largest, LowRank, Whole
from visiontrain.strategies.parameter_server.parts import split
from visiontrain.strategies.tensor_message import (
    HEAD,
    MOST_HEADER,
    RefusedError,
    Schema,
    pack,
    unpack,
)

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2, dtype=torch.int32)}
TENSORS["c"] = torch.ones(4, dtype=torch.bfloat16)


@given(st.sets(st.sampled_from("abc")))
def test_messages_come_back_as_they_went(names):
    schema = Schema.of(TENSORS)
    tensors, meta = unpack(pack(schema, {n: TENSORS[n] for n in names}, {"x": 1}), schema)
    assert tensors.keys() == names
    assert all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    assert meta == {"x": 1}


@given(st.sets(st.sampled_from("abc")), st.integers(0, 9))
def test_messages_are_read_where_they_lie(names, shift):
    """Where values are not aligned, as in the midst of something else, they are copied."""
    schema = Schema.of(TENSORS)
    packed = pack(schema, {n: TENSORS[n] for n in names}, {"x": "y" * shift})
    room = np.empty(len(packed) + shift, np.uint8)
    message = room[shift:]
    message[:] = packed
    tensors, _ = unpack(message, schema, copy=False)
    assert all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    first, last = message.ctypes.data, message.ctypes.data + len(message)
    for tensor in tensors.values():
        assert tensor.data_ptr() % tensor.element_size() == 0
        assert shift or first <= tensor.data_ptr() < last
    copies, _ = unpack(message, schema)
    assert not any(first <= tensor.data_ptr() < last for tensor in copies.values())


@settings(max_examples=300)
@given(st.data())
def test_a_spoilt_message_is_refused_or_read_never_worse(data):
    schema = Schema.of(TENSORS)
    message = pack(schema, TENSORS, {"x": 1}).copy()
    start = int.from_bytes(bytes(message[8:HEAD]), "big") + HEAD
    kind = data.draw(st.sampled_from(["cut", "longer", "flip"]))
    if kind == "cut":
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    elif kind == "longer":
        more = data.draw(st.sampled_from([1, 100, MOST_HEADER + schema.nbytes]))
        message = np.concatenate([message, np.zeros(more, np.uint8)])
    else:
        at = data.draw(st.integers(0, start - 1))
        message[at] ^= data.draw(st.integers(1, 255))
    try:
        tensors, _ = unpack(message, schema)
    except RefusedError:
        return
    assert kind == "flip"  # a name in what goes along
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in TENSORS.items()}


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"schema": 1, "which": None, "bytes": 34, "meta": []},
        {"schema": None, "which": [0, 0], "bytes": 48, "meta": {}},
        {"schema": None, "which": [2, 1], "bytes": 12, "meta": {}},
        {"schema": None, "which": [True], "bytes": 4, "meta": {}},
        {"schema": None, "which": [9], "bytes": 0, "meta": {}},
        {"schema": None, "which": {}, "bytes": 0, "meta": {}},
    ],
)
def test_a_header_that_lies_is_refused(header):
    schema = Schema.of(TENSORS)
    if isinstance(header, dict) and "schema" in header and header["schema"] is None:
        header = header | {"schema": schema.digest}
    text = json.dumps(header).encode()
    size = header.get("bytes", 0) if isinstance(header, dict) else 0
    message = b"visiontr" + len(text).to_bytes(4, "big") + text + bytes(size)
    with pytest.raises(RefusedError):
        unpack(np.frombuffer(message, np.uint8), schema)


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000), min_size=3),
    st.integers(1, 3),
)
def test_parts_are_whole_tensors_of_about_as_many_bytes(sizes, parts):
    made = split(sizes, parts)
    assert sorted(name for part in made for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in made]
    assert max(loads) - min(loads) <= max(sizes.values())


@pytest.mark.parametrize("encoding", [Whole(), Whole(torch.float16), Largest(0.2), LowRank(2)])
def test_what_is_left_out_is_sent_later(encoding):
    torch.manual_seed(0)
    gradients = {"m": torch.randn(24, 6, 3, 3), "v": torch.randn(5)}
    shapes = {name: tuple(t.shape) for name, t in gradients.items()}
    sums = {name: torch.zeros_like(t) for name, t in gradients.items()}
    for _ in range(60):
        sent = encoding.encode(gradients)
        for name, value in encoding.decode(sent, shapes).items():
            sums[name] += value
        for memory in encoding.memories.values():
            memory.settle(torch.tensor(True))
    for name, total in sums.items():
        gap = (total / 60 - gradients[name]).norm() / gradients[name].norm()
        assert gap < 0.15


def test_places_outside_of_a_matrix_are_refused():
    encoding = Largest(0.5)
    sent = encoding.encode({"m": torch.ones(4, 4)})
    sent["m.index"][0] = 16
    with pytest.raises(RefusedError, match="places outside"):
        encoding.decode(sent, {"m": (4, 4)})
