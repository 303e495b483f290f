"""Messages of tensors: a short header in JSON, then raw values in an order both sides know.

Nothing is ever unpickled. What is too long, or not what the schema says, is refused by its
length and header, before a value is looked at.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]  # (N,)
HEAD = 12  # bytes before the header: a mark, its length
ALIGNED = 8  # bytes: values begin at a multiple, so that they can be used where they lie
MARK = b"visiontr"
MOST_HEADER = 1 << 20  # bytes


LARGEST = 2.0**53  # of a number beside tensors


class RefusedError(ValueError):
    """A message that is not what it should be; says why."""


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a schema."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Return how many bytes its values take."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Schema:
    """The tensors that messages of a kind may hold, in order."""

    fields: tuple[Field, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps([[f.name, list(f.shape), str(f.dtype)] for f in self.fields])
        object.__setattr__(self, "digest", hashlib.sha256(text.encode()).hexdigest()[:16])

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Schema:
        """Describe tensors, in their order."""
        return cls(tuple(Field(n, tuple(t.shape), t.dtype) for n, t in tensors.items()))

    @property
    def nbytes(self) -> int:
        """Return how many bytes all values take."""
        return sum(each.nbytes for each in self.fields)


def pack(schema: Schema, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Bytes:
    """Write a message.

    Args:
        schema: that has these tensors, and perhaps more.
        tensors: by name, on any device.
        meta: JSON that goes along.

    Raises:
        RefusedError: that is longer than anybody would read.
    """
    chosen = [n for n, each in enumerate(schema.fields) if each.name in tensors]
    payload = sum(schema.fields[n].nbytes for n in chosen)
    which = None if len(chosen) == len(schema.fields) else chosen
    header = {"schema": schema.digest, "which": which, "bytes": payload, "meta": dict(meta)}
    text = json.dumps(header).encode()
    if len(text) > MOST_HEADER - ALIGNED:
        raise RefusedError(f"{len(text):,} bytes beside tensors; {MOST_HEADER:,} at most")
    text += b" " * (-(HEAD + len(text)) % ALIGNED)
    message = np.empty(HEAD + len(text) + payload, np.uint8)
    message[:HEAD] = np.frombuffer(MARK + len(text).to_bytes(HEAD - len(MARK), "big"), np.uint8)
    message[HEAD : HEAD + len(text)] = np.frombuffer(text, np.uint8)
    start = HEAD + len(text)
    for n in chosen:
        each = schema.fields[n]
        end = start + each.nbytes
        torch.from_numpy(message[start:end]).copy_(as_bytes(tensors[each.name]))
        start = end
    return message


def unpack(
    message: Bytes, schema: Schema, *, copy: bool = True
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read a message: its tensors and what goes along.

    Args:
        message: it.
        schema: that its tensors have to be of.
        copy: else tensors share the message's memory, which others may read, or which is
            protected: nothing may be written into them.

    Raises:
        RefusedError: it is longer than the schema allows, cut short, or of another schema.
    """
    header, start = read_header(message, schema)
    which = header["which"]
    chosen = range(len(schema.fields)) if which is None else which
    tensors = {}
    for n in chosen:
        each = schema.fields[n]
        end = start + each.nbytes
        part = message[start:end]
        fits = part.ctypes.data % each.dtype.itemsize == 0
        values = torch.from_numpy(part.copy() if copy or not fits else part)
        tensors[each.name] = values.view(each.dtype).reshape(each.shape)
        start = end
    return tensors, header["meta"]


def read_header(message: Bytes, schema: Schema) -> tuple[dict[str, Any], int]:
    """Return a message's header and where its values begin, once its lengths are right.

    Raises:
        RefusedError: they are not.
    """
    most = HEAD + MOST_HEADER + schema.nbytes
    if len(message) > most:
        raise RefusedError(f"{len(message)} bytes; the schema allows {most}")
    head = bytes(message[:HEAD])
    size = int.from_bytes(head[len(MARK) :], "big")
    if not head.startswith(MARK) or size > MOST_HEADER or HEAD + size > len(message):
        raise RefusedError(f"{len(message)} bytes that do not begin as a message does")
    try:
        header = json.loads(bytes(message[HEAD : HEAD + size]))
        theirs, which, payload = header["schema"], header["which"], header["bytes"]
        header["meta"].items()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(f"a header that is none ({type(error).__name__})") from error
    if theirs != schema.digest:
        raise RefusedError("tensors of other names, shapes or types than the servers'")
    if payload != _bytes_of(schema, which) or HEAD + size + payload != len(message):
        raise RefusedError(
            f"{len(message) - HEAD - size} bytes of values; {payload} in its header, and "
            f"{schema.nbytes} in all by the schema"
        )
    return header, HEAD + size


def _bytes_of(schema: Schema, which: Any) -> int:
    """Return how long the values of chosen fields are; -1 where they are no choice."""
    if which is None:
        return schema.nbytes
    known = range(len(schema.fields))
    if not isinstance(which, list) or not all(type(n) is int and n in known for n in which):
        return -1
    rising = all(a < b for a, b in pairwise(which))
    return sum(schema.fields[n].nbytes for n in which) if rising else -1


def as_bytes(tensor: Tensor) -> Tensor:
    """View a tensor's values as bytes (N,), on the CPU."""
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)


def is_count(value: Any) -> bool:
    """Tell whether a number from a message can be a count."""
    found = number_of(value)
    return found is not None and found >= 0


def number_of(value: Any) -> float | None:
    """Return a number from a message, in JSON of any length; None where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < LARGEST:
        return None  # NaN is below nothing
    return float(value)
