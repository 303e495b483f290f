"""Local SGD: every rank trains on its own, and now and then they agree on common weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import StateDict, Updatable, VisionModel
from visiontrain.core.types import Loss, Place
from visiontrain.strategies import comm
from visiontrain.strategies import config as settings
from visiontrain.strategies.base import DROPPED, NamedParts, add_up
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.processes import Processes

Named = Mapping[str, Tensor]


class LocalSGD(Processes):
    """Each rank steps by the gradient of its own share; every `sync_every` steps weights meet.

    In between ranks hold different weights. What is scored and saved is their mean: of the
    weights, of their averages over time, and of the optimizer's moments.
    """

    def __init__(self, place: Place, precision: Precision, config: settings.DDP) -> None:
        super().__init__(place, precision)
        self.apart = True
        self._every, self._outer = config.sync_every, OUTERS[config.outer](config)

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        self._outer.start(trained(model))

    # -- the step -----------------------------------------------------------------

    def total(self, parts: Sequence[Loss]) -> Loss:
        """Add up this rank's micro-batches only: its step is its own."""
        return add_up(parts, lambda values: values)

    def apply(self, learner: Updatable) -> Tensor:
        norm = learner.update()
        if (learner.step + 1) % self._every == 0:
            self._meet(learner.model)
        return norm

    def _meet(self, model: nn.Module) -> None:
        """Let all ranks go on from common weights; BatchNorm's statistics become their mean."""
        parameters, moved = trained(model), [m for m in model.modules() if m.training]
        buffers = [b for m in moved for b in m.buffers(recurse=False) if b.is_floating_point()]
        means = self._averaged([*parameters.values(), *buffers])
        fill(buffers, means[len(parameters) :])
        self._outer.step(parameters, dict(zip(parameters, means, strict=False)))

    def _averaged(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        whole = sum(tensor.nbytes for tensor in tensors)
        self.bytes_sent += 2 * comm.ring_bytes(whole, self.place.world)
        return comm.averaged(tensors)

    # -- evaluation and state -----------------------------------------------------

    def level(self, model: VisionModel) -> None:
        """Take the mean over ranks of what is about to be scored."""
        floats = [t for t in model.state_dict().values() if t.is_floating_point()]
        fill(floats, comm.averaged(floats))

    def collect(self, tensors: Named, *, everywhere: bool = True) -> StateDict:
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        means = dict(zip(floats, comm.averaged(list(floats.values())), strict=True))
        return super().collect({**tensors, **means}, everywhere=everywhere)

    def collect_own(self, named: NamedParts) -> StateDict:
        """Add all that ranks hold apart: weights, averages, moments, the outer optimizer."""
        parts = {**named, "precision": self.precision.tensors()}
        own = {f"{part}/{name}": t for part, some in parts.items() for name, t in some.items()}
        outer = {f"outer/{name}": tensor for name, tensor in self._outer.state().items()}
        gathered = comm.gather_named(own | outer, self.place.device)
        return super().collect_own(named) | gathered

    def load_own(self, saved: Named, named: NamedParts) -> str | None:
        """Take it back; with another number of ranks all go on from the mean that is loaded."""
        super().load_own(saved, named)
        # Before ranks part again: it starts from what they have in common.
        self._outer.start({name: named["model"][name] for name in self._outer.names})
        mine = comm.own_part(saved, self.place.rank, self.place.world) or {}
        if not comm.under(mine, "model/"):
            return DROPPED if any(name.startswith("rank") for name in saved) else None
        for part, some in {**named, "precision": self.precision.tensors()}.items():
            own = comm.under(mine, f"{part}/")
            if some.keys() <= own.keys():  # else the run had another precision
                self.scatter(own, some)
        outer = comm.under(mine, "outer/")
        if outer.keys() != self._outer.state().keys():  # another outer optimizer's
            return DROPPED
        self._outer.load({name: tensor.to(self.place.device) for name, tensor in outer.items()})
        return None


class Average:
    """All go on from the mean (Stich 2018, arXiv 1805.09767)."""

    def __init__(self, config: settings.DDP) -> None:
        del config
        self.names: tuple[str, ...] = ()

    def start(self, parameters: Named) -> None:
        """Note which parameters there are."""
        self.names = tuple(parameters)

    def step(self, parameters: Named, means: Named) -> None:
        """Set each rank's parameters to their mean."""
        fill(list(parameters.values()), [means[name] for name in parameters])

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: Named) -> None:
        """Do nothing."""


class DiLoCo:
    """The way to the mean is a gradient (Douillard et al. 2023, arXiv 2311.08105).

    An outer SGD with Nesterov's momentum applies it to the weights that all ranks came from.
    """

    def __init__(self, config: settings.DDP) -> None:
        self._lr, self._momentum = config.outer_lr, config.outer_momentum
        self.names: tuple[str, ...] = ()
        self._from: dict[str, Tensor] = {}
        self._velocity: dict[str, Tensor] = {}

    def start(self, parameters: Named) -> None:
        """Begin at these weights, at rest."""
        self.names = tuple(parameters)
        self._from = {name: p.detach().clone() for name, p in parameters.items()}
        self._velocity = {name: torch.zeros_like(p) for name, p in self._from.items()}

    @torch.no_grad()
    def step(self, parameters: Named, means: Named) -> None:
        """Step from the common weights towards the mean and beyond; all go on from there."""
        for name, parameter in parameters.items():
            start, velocity = self._from[name], self._velocity[name]
            gradient = start - means[name]
            velocity.mul_(self._momentum).add_(gradient)
            start.sub_(self._lr * (gradient + self._momentum * velocity))
            parameter.copy_(start)

    def state(self) -> dict[str, Tensor]:
        """Return the common weights and the velocity."""
        return {f"from/{n}": t for n, t in self._from.items()} | {
            f"velocity/{n}": t for n, t in self._velocity.items()
        }

    def load(self, state: Named) -> None:
        """Take what `state` returned."""
        self._from, self._velocity = comm.under(state, "from/"), comm.under(state, "velocity/")


OUTERS: dict[str, Callable[[settings.DDP], Average | DiLoCo]] = {
    "average": Average,
    "diloco": DiLoCo,
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters that train; the mean of frozen ones would move them by rounding."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def fill(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into tensors, in order."""
    for tensor, value in zip(into, values, strict=True):
        tensor.copy_(value)
