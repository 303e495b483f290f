"""The collectives the package uses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(values: Tensor) -> Tensor:
    """Sum over all ranks, into a new tensor."""
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


def ring_bytes(whole: int, world: int) -> int:
    """Return what each rank sends in a ring's reduce-scatter or all-gather of `whole` bytes.

    An all-reduce is both, so twice that (Patarasu and Yuan 2009).
    """
    return whole * (world - 1) // world


def any_rank(*, flag: bool) -> bool:
    """Tell whether `flag` is set on any rank; asked between CPUs, so that no GPU is waited for."""
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def subgroup(parts: Sequence[Sequence[int]], device: torch.device) -> Any:
    """Form a group of each part of the ranks; return this rank's. Collective.

    They wait as long as the group of all does: left alone, they take torch's half an hour. On GPUs
    twice that, as there, for a watchdog ends its process: the CPUs first tell who hangs.
    """
    cpu, world = torch.device("cpu"), dist.group.WORLD
    assert world is not None
    timeout = world._get_backend(cpu).options._timeout
    own: Any = dist.new_subgroups_by_enumeration([*map(list, parts)], timeout=timeout)[0]
    if device.type == "cuda":
        own._get_backend(device)._set_default_timeout(2 * timeout)
    return own


def broadcast_json(value: Any, source: int = 0) -> Any:
    """Return rank `source`'s JSON value on every rank: text as bytes, never a pickle."""
    text = json.dumps(value).encode() if dist.get_rank() == source else b""
    size = torch.tensor(len(text))
    dist.broadcast(size, source)
    data = torch.empty(int(size.item()), dtype=torch.uint8)
    if dist.get_rank() == source:
        data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    dist.broadcast(data, source)
    return json.loads(bytes(data.tolist()))


def gather_rows(rows: Tensor, device: torch.device) -> Tensor:
    """Return all ranks' rows (K, columns), stacked in rank order; K may differ."""
    world = dist.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor(len(rows), device=device))
    counts = [int(size.item()) for size in sizes]
    padded = rows.new_zeros((max(counts), rows.shape[1]), device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(rows.device)


def broadcast_tensors(
    tensors: Mapping[str, Tensor], device: torch.device, source: int
) -> dict[str, Tensor]:
    """Return rank `source`'s named CPU tensors on every rank: a JSON header, then raw values."""
    header = {name: (list(t.shape), str(t.dtype).split(".")[1]) for name, t in tensors.items()}
    received = {}
    for name, (shape, dtype) in broadcast_json(header, source).items():
        value = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if dist.get_rank() == source:
            value.copy_(tensors[name])
        dist.broadcast(value, source)
        received[name] = value.cpu()
    return received


def gather_named(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return all ranks' named tensors on rank 0, as `rank1/NAME` on the CPU; nothing elsewhere.

    Names and shapes are the same on all ranks.
    """
    world, main = dist.get_world_size(), dist.get_rank() == 0
    gathered = {}
    for name, tensor in tensors.items():
        value = tensor.detach().to(device).contiguous()
        parts = [torch.empty_like(value) for _ in range(world)] if main else None
        dist.gather(value, parts)
        for rank, part in enumerate(parts or []):
            gathered[f"rank{rank}/{name}"] = part.cpu()
    return gathered


def own_part(saved: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor] | None:
    """Return what `gather_named` was given on `rank`; None if there were more or fewer ranks."""
    ranks = {name.split("/")[0] for name in saved if name.startswith("rank")}
    if ranks and ranks != {f"rank{other}" for other in range(world)}:
        return None
    return under(saved, f"rank{rank}/")


def under(named: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without it."""
    return {k.removeprefix(prefix): t for k, t in named.items() if k.startswith(prefix)}


def averaged(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the means of tensors over all ranks, as new tensors; one collective for each type."""
    means: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [(i, tensor) for i, tensor in enumerate(tensors) if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().flatten() for _, tensor in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for _, tensor in same])
        means |= {i: part.view_as(t) for (i, t), part in zip(same, parts, strict=True)}
    return [means[i] for i in range(len(tensors))]
