"""batch=-1: how many images fit, from the tensors that a forward pass keeps for its backward."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import VisionModel

SHARE = 0.6  # of the free memory: kernels, the loss and fragmentation take some as well
STATES = 5  # weights, gradients, two moments and the average, each as large as the model
STEPS = 12  # an epoch keeps at least so many: few large steps starve a small set
# More images at a time save no time on a CPU, and little on a GPU.
MOST = {"cpu": 16, "cuda": 128}


@dataclass(frozen=True, slots=True)
class Room:
    """What a batch must fit into."""

    free: int  # bytes that one process may use
    images: int  # of an epoch
    processes: int  # that share the batch
    accumulate: int  # micro-batches it is cut into
    device: str  # cpu or cuda
    half: bool  # activations have 16 bits


def fitting_batch(model: VisionModel, side: int, room: Room) -> int:
    """Return a batch over all processes, a power of two each, that fits and is worth it.

    Args:
        model: on the meta device.
        side: of the square input, pixels.
        room: what it must fit into.
    """
    fixed = STATES * sum(p.numel() * p.element_size() for p in model.parameters())
    each = kept_bytes(model, side) / (2 if room.half else 1)
    fits = max(1, int((SHARE * room.free - fixed) / each)) * room.accumulate
    worth = max(1, room.images // STEPS // room.processes)
    return _power_of_two(min(fits, worth, MOST[room.device])) * room.processes


def _power_of_two(number: int) -> int:
    return 1 << (number.bit_length() - 1)


def kept_bytes(model: nn.Module, side: int) -> float:
    """Return how many bytes one image leaves behind in a training forward pass, at fp32.

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
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.empty(2, 3, side, side, device="meta"))  # of one alone there is no deviation
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 2


def free_memory(device: torch.device, processes: int) -> int:
    """Return the bytes that each of `processes` may use on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else 0
    return max(pages * os.sysconf("SC_PAGE_SIZE"), 2**30) // processes
