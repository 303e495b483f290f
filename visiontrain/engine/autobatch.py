"""batch=-1: how many images fit, from the tensors that a forward pass keeps for its backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import IMAGE, VisionModel

SHARE = 0.6  # of the free memory: kernels, the loss and fragmentation take some as well
STATES = 5  # weights, gradients, two moments and the average, each as large as the model
STEPS = 12  # an epoch keeps at least so many: few large steps starve a small set
# More images at a time save no time on a CPU, and little on a GPU.
MOST = {"cpu": 16, "cuda": 128}
UNKNOWN = 2**35  # bytes; where nothing tells of memory, `MOST` decides


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch must fit into."""

    free: int  # bytes that one process may use
    images: int  # of an epoch
    processes: int  # that share the batch
    accumulate: int  # micro-batches it is cut into
    device: str  # cpu or cuda
    width: int = 4  # bytes per number of the activations


def fitting_batch(model: VisionModel, side: int, room: Room) -> int:
    """Return a batch over all processes, a power of two each, that fits and is worth it.

    It grows with the processes, as their memory does; the learning rate does not.

    Args:
        model: on the meta device.
        side: of the largest square input, pixels.
        room: what it must fit into.
    """
    fixed = STATES * sum(p.numel() for p in model.parameters()) * max(4, room.width)
    each = kept_bytes(model, side) * room.width / 4
    fits = max(1, int((SHARE * room.free - fixed) / each)) * room.accumulate
    worth = max(1, room.images // STEPS // room.processes)
    return _power_of_two(min(fits, worth, MOST[room.device])) * room.processes


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def kept_bytes(model: nn.Module, side: int) -> float:
    """Return the most bytes that one image holds in a training step, at fp32, the loss aside.

    That is what its forward pass leaves behind for the backward pass. Where blocks recompute,
    it is what goes from block to block, and what the largest one keeps inside.

    Args:
        model: on the meta device, where nothing is computed.
        side: of the square input, pixels.
    """
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in owned:
            kept[key] = tensor  # views of one tensor count once; held, or its number came again
        return tensor

    model.train()
    images = torch.empty(2, 3, side, side, device="meta")  # of one alone there is no deviation
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if isinstance(model, VisionModel) and model.recompute:
            return _recomputed_bytes(model, images, kept) / 2
        model(images)
    return _bytes(kept) / 2


def _recomputed_bytes(model: VisionModel, images: Tensor, kept: dict[int, Tensor]) -> int:
    """Add up the inputs of all blocks, and the most that a block leaves in `kept` beside them."""
    values: dict[str, Any] = {IMAGE: images}
    between: dict[int, Tensor] = {}
    inside = []
    for name, block in model.blocks.items():
        inputs = [values[source] for source in model.inputs[name]]
        between |= {tensor.untyped_storage()._cdata: tensor for tensor in inputs}
        kept.clear()
        values[name] = block(*inputs)
        inside.append(_bytes({key: t for key, t in kept.items() if key not in between}))
    return _bytes(between) + max(inside)


def _bytes(tensors: Mapping[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def free_memory(device: torch.device, processes: int) -> int:
    """Return the bytes that each of `processes` may use on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    told = (_available(), _left_by_limits(), UNKNOWN)
    return min(number for number in told if number is not None) // processes


def _available() -> int | None:
    """Return what the kernel could free for us; page caches count, unlike in SC_AVPHYS_PAGES."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _left_by_limits() -> int | None:
    """Return what a container's limit (cgroup v2) leaves; None where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        most, used, stat = (
            (folder / f"memory.{name}").read_text(encoding="utf-8")
            for name in ("max", "current", "stat")
        )
        cached = dict(line.split() for line in stat.splitlines()).get("inactive_file", "0")
        return max(0, int(most) - int(used) + int(cached))
    except (OSError, ValueError):  # no such limit, or "max"
        return None
