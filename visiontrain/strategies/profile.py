"""What each block of a model costs on this machine: seconds, and bytes kept and passed on."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.interfaces import IMAGE, VisionModel

ROUNDS = 5  # at most
SECONDS = 4.0  # after which no further round begins


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One block, for one micro-batch."""

    name: str
    forward: float  # seconds
    backward: float  # seconds; 0 where nothing trains up to here
    parameters: int  # bytes
    trained: int  # bytes of those parameters that train
    buffers: int  # bytes of those that are averaged, as BatchNorm's statistics
    kept: int  # bytes that stay for the backward pass, its outputs among them
    given: int  # bytes of its outputs
    passed: int  # bytes of what is live after it, which a cut there would send
    passed_back: int  # bytes of gradients that would come back for it


def measure(model: VisionModel, images: Tensor) -> list[BlockCost]:
    """Run a training step block by block, some times; medians, but for the first time.

    Args:
        model: in training mode; its BatchNorm statistics move, its gradients do not stay.
        images: (B, 3, H, W), where the model is.
    """
    began, rounds = time.perf_counter(), [_round(model, images)]
    while len(rounds) < 2 or (len(rounds) <= ROUNDS and time.perf_counter() - began < SECONDS):
        rounds.append(_round(model, images))
    return [
        replace(
            block[0],
            forward=statistics.median(cost.forward for cost in block[1:]),
            backward=statistics.median(cost.backward for cost in block[1:]),
        )
        for block in zip(*rounds, strict=True)
    ]


def recomputed(costs: Sequence[BlockCost]) -> list[BlockCost]:
    """Return the costs of blocks whose backward pass begins with their forward pass again."""
    return [replace(cost, backward=cost.backward + cost.forward) for cost in costs]


def _round(model: VisionModel, images: Tensor) -> list[BlockCost]:
    values: dict[str, Any] = {IMAGE: images}
    costs = []
    for place, name in enumerate(model.blocks, start=1):
        inputs = [_leaf(values[source]) for source in model.inputs[name]]
        with _saved(model, inputs) as saved:
            outputs, forward = _timed(images.device, partial(_run, model, name, inputs))
        flat = outputs if isinstance(outputs, tuple) else (outputs,)
        saved |= {_storage(value): value.nbytes for value in flat}
        values[name] = outputs
        live = [values[source] for source in model.live(place)] or list(flat)
        parameters = list(model.blocks[name].parameters())
        floats = [b for b in model.blocks[name].buffers() if b.is_floating_point()]
        costs.append(
            BlockCost(
                name,
                forward,
                _backward_time(model, name, inputs, flat),
                parameters=_bytes(parameters),
                trained=_bytes(p for p in parameters if p.requires_grad),
                buffers=_bytes(floats),
                kept=sum(saved.values()),
                given=_bytes(flat),
                passed=_travelling(live, model),
                passed_back=_travelling([v for v in live if v.requires_grad], model),
            )
        )
    return costs


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _travelling(values: Iterable[Tensor], model: VisionModel) -> int:
    """Count bytes in the type of the weights, in which stages send."""
    size = next(model.parameters()).element_size()
    return sum(size * value.numel() for value in values)


def _run(model: VisionModel, name: str, inputs: Sequence[Tensor]) -> Any:
    (outputs,) = model.run([name], dict(zip(model.inputs[name], inputs, strict=True)), [name])
    return outputs


def _leaf(value: Tensor) -> Tensor:
    """Cut a value from what made it; it asks for a gradient if it would have got one."""
    return value.detach().requires_grad_(value.requires_grad)


def _backward_time(
    model: VisionModel, name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> float:
    wanted = [value for value in outputs if value.requires_grad]
    if not wanted:
        return 0.0
    grads = [torch.ones_like(value) for value in wanted]
    _, seconds = _timed(wanted[0].device, lambda: torch.autograd.backward(wanted, grads))
    for tensor in (*inputs, *model.blocks[name].parameters()):
        tensor.grad = None
    return seconds


def _timed(device: torch.device, call: Callable[[], Any]) -> tuple[Any, float]:
    _wait(device)
    began = time.perf_counter()
    result = call()
    _wait(device)
    return result, time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextmanager
def _saved(model: VisionModel, inputs: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Note what is saved for the backward pass, the model's own and the inputs aside."""
    aside = {_storage(t) for t in (*model.parameters(), *model.buffers(), *inputs)}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in aside:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved
