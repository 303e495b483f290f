"""The state that training advances, and the one way to advance it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontrain.core.interfaces import StateDict, Task, VisionModel
from visiontrain.engine.eager import Eager
from visiontrain.engine.muon import Muon, is_matrix
from visiontrain.engine.optim import Schedule
from visiontrain.strategies.base import Strategy


@dataclass(slots=True)
class Learner:
    """Model, task, optimizer, weight average and how far they have come."""

    strategy: Strategy
    task: Task
    model: VisionModel
    optimizer: Optimizer
    schedule: Schedule
    clip: float
    seed: int
    ema: dict[str, Tensor] | None  # parameters and float buffers, averaged
    lr: float = 0.0  # of the last step, before any block's share
    step: int = 0
    samples: int = 0
    failed: Tensor = field(
        default_factory=lambda: torch.zeros(())
    )  # () 1.0 if the last step failed
    nonfinite: Tensor = field(default_factory=lambda: torch.zeros(()))  # (): failed steps in a row
    before: Sequence[Tensor] = ()  # float buffers as the running step found them
    # Looked up once: walking through the modules costs a tenth of a small step.
    trained: Mapping[str, Sequence[Tensor]] = field(init=False)  # parameters by their head
    buffers: list[Tensor] = field(init=False)  # what training moves (BatchNorm statistics)
    live: Mapping[str, Tensor] = field(init=False)  # what the average is taken of

    def __post_init__(self) -> None:
        device = self.strategy.place.device
        self.failed, self.nonfinite = self.failed.to(device), self.nonfinite.to(device)
        fill_state(self.optimizer)
        heads = {name: self.task.head_of(name) for name, _ in self.model.named_parameters()}
        self.trained = {
            head: [p for n, p in self.model.named_parameters() if heads[n] == head]
            for head in self.task.heads
        }
        self.buffers = [b for b in self.model.buffers() if b.is_floating_point()]
        self.live = averaged(self.model)

    @property
    def progress(self) -> float:
        """Samples seen, as a share of the whole run's."""
        return self.schedule.progress(self.samples)

    def rate(self, progress: float) -> float:
        """Return the learning rate after a share of the whole run."""
        return self.schedule.lr(round(progress * self.schedule.total))

    def begin(self) -> None:
        """Clear gradients; remember the buffers, should the step fail."""
        self.optimizer.zero_grad(set_to_none=True)
        self.before = torch._foreach_mul(self.buffers, 1.0) if self.buffers else []

    def update(self, rate: float = 1.0) -> Tensor:
        """Clip, set the learning rate, step, move the average; return the gradient norm ().

        A non-finite norm suppresses the whole update on the device, without a sync.

        Args:
            rate: share of the learning rate.
        """
        norm = self.strategy.clip_grad_norm(self.model, self.clip)
        failed = self.note(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate * group["lr_share"]
        # Fused kernels, and our SGD, look for it.
        self.optimizer.found_inf = failed  # pyrefly: ignore
        self.optimizer.step()
        self.strategy.precision.update(self.failed)
        flags = {b.device: (self.failed > 0).to(b.device) for b in self.buffers}
        for buffer, old in zip(self.buffers, self.before, strict=True):
            torch.where(flags[buffer.device], old, buffer, out=buffer)
        self.average()
        return norm

    def note(self, norm: Tensor) -> Tensor:
        """Note an update by its gradient norm, applied here or elsewhere; 1.0 () if it failed."""
        failed = (~torch.isfinite(norm)).float()  # where the gradients are: on the CPU if offloaded
        self.failed = failed.to(self.nonfinite.device)
        self.nonfinite = (self.nonfinite + 1) * self.failed
        self.lr = self.schedule.lr(self.samples)
        return failed

    @torch.no_grad()
    def average(self) -> None:
        """Move the average of the weights, unless the step failed."""
        if not self.ema:  # a pipeline's stage may have no parameter
            return
        local, live = self.strategy.local, self.live
        ema = [local(tensor) for tensor in self.ema.values()]
        now = [local(live[name]).to(e.dtype) for name, e in zip(self.ema, ema, strict=True)]
        share = self.schedule.ema_share(self.samples) * (1 - self.failed)
        # Parameters may lie on the CPU, and buffers beside them on a GPU.
        for device in {e.device for e in ema}:
            pairs = [pair for pair in zip(ema, now, strict=True) if pair[0].device == device]
            olds, news = [old for old, _ in pairs], [new for _, new in pairs]
            approach(olds, news, share.to(device), few_kernels=device.type == "cuda")

    @contextmanager
    def evaluating(self) -> Iterator[VisionModel]:
        """Hold the averaged weights in the model, in eval mode; swap back whatever happens."""
        self.strategy.sync_buffers(self.model)
        changing = self.live if self.strategy.apart else self.ema or {}
        kept = {name: self.live[name].clone() for name in changing}
        try:
            self._fill(self.live, self.ema or {})
            self.model.eval()
            yield self.model
        finally:
            self._fill(self.live, kept)
            self.model.train()

    @torch.no_grad()
    def _fill(self, into: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.strategy.local(into[name]).copy_(self.strategy.local(value))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all state as named tensors of this process: model, ema, optimizer."""
        return {
            "model": dict(self.model.state_dict()),
            "ema": dict(self.ema or {}),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
        }

    def collect(self, *, everywhere: bool = True) -> dict[str, StateDict]:
        """Return all state as whole tensors on the CPU, or on the main process's. Collective."""
        collect = self.strategy.collect
        self.strategy.sync_buffers(self.model)
        return {
            part: collect(named, everywhere=everywhere) for part, named in self.tensors().items()
        }

    def load(self, whole: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take state that any mode and world size collected. Collective."""
        for part, named in self.tensors().items():
            self.strategy.scatter(whole[part], named)


def approach(
    tensors: list[Tensor], others: list[Tensor], share: Tensor, *, few_kernels: bool
) -> None:
    """Move tensors a share () of the way to others, in place.

    With a share on the device torch has no lerp for lists: it starts a kernel for each tensor,
    which a CPU does best.
    """
    if not few_kernels:
        torch._foreach_lerp_(tensors, others, [share.to(t.dtype) for t in tensors])
        return
    ways = torch._foreach_sub(others, tensors)
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(tensors, ways)


def averaged(model: nn.Module) -> dict[str, Tensor]:
    """Name the tensors the average is taken of: parameters and float buffers, as they change."""
    return {k: v for k, v in model.state_dict().items() if v.is_floating_point()}


def start_average(model: nn.Module, weights: torch.dtype) -> dict[str, Tensor]:
    """Return the first average: the weights themselves, each placed like its parameter."""
    return {n: t.detach().clone().to(weights) for n, t in averaged(model).items()}


def fill_state(optimizer: Optimizer) -> None:
    """Make the optimizer's state as zeros, so that it can be loaded and suppressed at step 0."""
    if type(optimizer) is Eager:  # others apply what it clears
        return
    adam, muon = isinstance(optimizer, torch.optim.AdamW), isinstance(optimizer, Muon)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if adam or (muon and not is_matrix(p)):
                steps = torch.zeros((), dtype=torch.float32, device=p.device)
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[p] = {"step": steps} | moments
            else:
                optimizer.state[p] = {"momentum_buffer": torch.zeros_like(p)}


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Name the optimizer's tensors after the model's parameters: `stem.conv.weight.exp_avg`."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{names[p]}.{key}": value
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
