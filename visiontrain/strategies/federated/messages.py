"""What a server and its clients say to each other: tensors and JSON; what a server believes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import VisionModel
from visiontrain.strategies.comm import under
from visiontrain.strategies.federated.algorithms import Named, Update
from visiontrain.strategies.tensor_message import (
    HEAD,
    MARK,
    MOST_HEADER,
    Bytes,
    RefusedError,
    Schema,
    is_count,
    number_of,
    pack,
    unpack,
)

WEIGHT, CONTROL = "weight/", "control/"  # of names in messages
NORMS = ("BatchNorm", "GroupNorm", "LayerNorm", "InstanceNorm")  # in names of their classes


# What a client elsewhere is told of a run; where data and results lie is its own affair.
SENT = (
    *("model", "task", "augment", "optim", "strategy", "epochs", "batch", "accumulate"),
    *("recompute", "imgsz", "precision", "freeze", "seed", "save"),
)


def run_for(run_json: str) -> dict[str, Any]:
    """Return what clients elsewhere are told of a settled run: keys of it."""
    run = json.loads(run_json)
    kept = {key: run[key] for key in SENT}
    kept["strategy"] = {k: v for k, v in run["strategy"].items() if k not in ("serve", "keys")}
    return kept


def digest_of(names: Sequence[str]) -> str:
    """Return what tells classes in their order from any others: messages have room for no more."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Shared:
    """Which tensors of a model travel."""

    down: tuple[str, ...]  # parameters and float buffers that clients get
    up: tuple[str, ...]  # those of them that training moves
    own: tuple[str, ...]  # what each client keeps for itself

    @property
    def all(self) -> tuple[str, ...]:
        """Return what a client needs at first."""
        return (*self.down, *self.own)


def shared(model: VisionModel, local: Sequence[str]) -> Shared:
    """Divide a model's parameters and float buffers; `local` names parts that stay.

    A detector's head is its last block, its neck what lies between that and the body.

    Raises:
        ConfigError: a part that the model lacks, or nothing is left to travel.
    """
    live = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    norms = names_of_norms(model)
    parts = {name: part_of(model, name) for name in live}
    stays = [n for n in live if parts[n] in local or ("norm" in local and n in norms)]
    moved = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = tuple(f"blocks.{name}." for name in model.frozen)
    moved |= {n for n in live if n not in dict(model.named_parameters())}
    down = tuple(n for n in live if n not in stays)
    up = tuple(n for n in down if n in moved and not n.startswith(frozen))
    for part in local:
        if not any(parts[n] == part or (part == "norm" and n in norms) for n in live):
            raise ConfigError(f"strategy.local: {part}; the model has no such part, leave it out")
    if not up:
        raise ConfigError(f"strategy.local: {', '.join(local)}; nothing would travel, take less")
    return Shared(down, up, tuple(stays))


def part_of(model: VisionModel, name: str) -> str:
    """Tell whether a tensor belongs to the backbone, the neck or the head."""
    if name.startswith(tuple(model.body)):
        return "backbone"
    last = f"blocks.{list(model.blocks)[-1]}."
    return "head" if name.startswith(last) else "neck"


def names_of_norms(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters and buffers of layers that normalise."""
    found = set()
    for prefix, module in model.named_modules():
        if any(name in type(module).__name__ for name in NORMS):
            found |= {f"{prefix}.{n}" for n, _ in module.named_parameters(recurse=False)}
            found |= {f"{prefix}.{n}" for n, _ in module.named_buffers(recurse=False)}
    return frozenset(found)


def schema_of(live: Named, names: Sequence[str], controls: Sequence[str]) -> Schema:
    """Describe messages that hold some of these weights and of the variates of some parameters."""
    weights = {WEIGHT + n: live[n] for n in names}
    return Schema.of(weights | {CONTROL + n: live[n] for n in controls})


def write(schema: Schema, weights: Named, controls: Named, meta: Mapping[str, Any]) -> Bytes:
    """Write a message."""
    tensors = {WEIGHT + n: t for n, t in weights.items()}
    return pack(schema, tensors | {CONTROL + n: t for n, t in controls.items()}, meta)


def read(message: Bytes, schema: Schema) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:
    """Read a message: weights, variates, and what goes along.

    Raises:
        RefusedError: it is not of this schema.
    """
    tensors, meta = unpack(message, schema)
    return under(tensors, WEIGHT), under(tensors, CONTROL), meta


def read_meta(message: Bytes) -> Mapping[str, Any]:
    """Read what goes along with the tensors of a message; nothing where it is no message."""
    head = bytes(message[:HEAD])
    size = int.from_bytes(head[len(MARK) :], "big")
    if not head.startswith(MARK) or size > MOST_HEADER:
        return {}
    try:
        meta = json.loads(bytes(message[HEAD : HEAD + size]))["meta"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def believed(
    message: Bytes, schema: Schema, heads: Sequence[str], client: int
) -> tuple[Update, Mapping[str, Any]]:
    """Read what a client made of a round, if it can be that.

    Raises:
        RefusedError: other tensors, numbers that are not finite, counts that are none.
    """
    weights, controls, meta = read(message, schema)
    if len(weights) + len(controls) != len(schema.fields):
        raise RefusedError(f"{len(weights) + len(controls)} tensors of {len(schema.fields)}")
    tensors = [*weights.values(), *controls.values()]
    if tensors and not bool(torch.stack(torch._foreach_norm(tensors)).isfinite().all()):
        raise RefusedError("numbers that are not finite")
    counts, steps = meta.get("counts"), meta.get("steps")
    if not isinstance(counts, dict) or counts.keys() != set(heads):
        raise RefusedError("counts of other heads than the task's")
    if not all(map(is_count, [*counts.values(), steps, meta.get("images")])) or not steps:
        raise RefusedError("counts that are none")
    negative = next((n for n, t in weights.items() if is_variance(n) and bool((t < 0).any())), None)
    if negative is not None:
        raise RefusedError(f"{negative}: a variance below zero")
    return Update(client, weights, counts, steps, controls), meta


def is_variance(name: str) -> bool:
    """Tell whether a tensor is one of variances."""
    return name.endswith("running_var")


def term_in(meta: Mapping[str, Any], name: str) -> float | None:
    """Return a term of the loss from a client's message; None where there is no number."""
    found = meta.get("terms")
    return number_of(found.get(name)) if isinstance(found, dict) else None
