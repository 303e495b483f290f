"""Files of tensors (safetensors): written without a copy in memory, read by name or by rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visiontrain.core.durable import write_parts
from visiontrain.core.errors import CheckpointError
from visiontrain.core.interfaces import TensorSource

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Write a file of CPU tensors and wait until it is on the disk; return its sha256.

    After github.com/huggingface/safetensors: eight bytes that say how long the header is, the
    header as JSON, the values. Its own writer copies all values first, and names no errno.

    Args:
        path: where to.
        tensors: by name.
        about: what the header says of the whole.
    """
    # The widest first, so that every value lies at a multiple of its own size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for name in order:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        places = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = {"dtype": TYPES[tensor.dtype], **places}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    values = (_bytes(tensors[name]) for name in order)
    return write_parts(path, chain([len(text).to_bytes(8, "little"), text], values))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass(frozen=True, slots=True)
class Stored:
    """A run of rows of a tensor, in an open file."""

    file: Any  # of safetensors
    key: str  # its name in there
    start: int  # its first row's place in the whole tensor
    count: int  # of rows


class StoredTensors(TensorSource):
    """Tensors in files; each lies in one of them, or is cut into runs of rows."""

    def __init__(self, pieces: Mapping[str, Sequence[Stored]]) -> None:
        """Note what lies where: for each name its runs in the order of their rows."""
        self._pieces = pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        whole = [piece.file.get_tensor(piece.key) for piece in pieces]
        return whole[0] if len(whole) == 1 else torch.cat(whole)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read nothing but what is asked for."""
        pieces = self._pieces[name]
        spans = [(max(start - p.start, 0), min(stop - p.start, p.count)) for p in pieces]
        found = [
            piece.file.get_slice(piece.key)[first:last]
            for piece, (first, last) in zip(pieces, spans, strict=True)
            if first < last
        ]
        if not found:
            return self[name][:0]
        return found[0] if len(found) == 1 else torch.cat(found)


def open_file(path: Path) -> Any:
    """Open a file of tensors.

    Raises:
        CheckpointError: it is missing or none.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: no file of tensors ({error}); an older one is used"
        ) from error


def open_tensors(path: Path) -> StoredTensors:
    """Open a file that holds whole tensors.

    Raises:
        CheckpointError: it is missing or none.
    """
    file = open_file(path)
    keys: list[str] = list(file.keys())
    return StoredTensors({key: [Stored(file, key, 0, shape_in(file, key)[0])] for key in keys})


def shape_in(file: Any, key: str) -> tuple[int, ...]:
    """Return the shape of a tensor in an open file; a single number counts as a row."""
    return tuple(file.get_slice(key).get_shape()) or (1,)
