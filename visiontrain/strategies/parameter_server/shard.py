"""What a push and a pull mean to a server, which holds a share of the weights; knows no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import Updatable, VisionModel
from visiontrain.core.types import Loss, Place
from visiontrain.strategies.aggregate import AGGREGATES
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.comm import under
from visiontrain.strategies.parameter_server.encoding import Encoding
from visiontrain.strategies.parameter_server.ledger import Slot
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.tensor_message import (
    Bytes,
    RefusedError,
    Schema,
    is_count,
    pack,
    unpack,
)

GRADIENT, BUFFER = "gradient/", "buffer/"  # of names in a push


class Held(Strategy):
    """A server's side of the mode: some of the parameters, and what the others' norms come to."""

    def __init__(self, place: Place, precision: Precision, names: frozenset[str]) -> None:
        super().__init__(place, precision)
        self.names = names  # of the parameters and buffers that it holds
        self.agreed: Tensor | None = None  # (): squared norm of the gradients of all servers

    def setup(self, model: VisionModel) -> None:
        """Keep what this server holds; the rest becomes empty slots, so names stay the same."""
        super().setup(model)
        keep_only(model, self.names)

    def sum_shards(self, value: Tensor) -> Tensor:
        return value if self.agreed is None else self.agreed.to(value)


def keep_only(model: nn.Module, names: frozenset[str]) -> None:
    """Take all parameters and buffers out of a model but those with these names."""
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            for name in held:
                if f"{prefix}.{name}".lstrip(".") not in names:
                    held[name] = None


@dataclass(frozen=True, slots=True)
class Rules:
    """How gradients become an update."""

    encoding: Encoding
    aggregate: str = "mean"
    faulty: int = 1
    rate: float = 1.0  # of the learning rate that an update has
    share: float = 1.0  # of a step: each of W gradients that are alone has 1/W
    ages: int = 0  # rate falls with staleness in units of this; 0: it does not
    elastic: bool = False  # whether workers send how far the weights are to go
    own_units: bool = False  # whether gradients come divided by their own counts
    batch_share: float = 1.0  # of a step's images, in an update


@dataclass(slots=True)
class Push:
    """One worker's gradient of a share, decoded."""

    tensors: Mapping[str, Tensor]
    counts: Mapping[str, float]
    version: int  # of the weights it was computed from


@dataclass(frozen=True, slots=True)
class Applied:
    """What an update did."""

    norm: float  # of the gradients of all servers, before clipping
    staleness: int  # updates between the weights' reading and this, the most of its gradients


@dataclass(slots=True)
class Waiting:
    """Gradients of an update that is not complete."""

    places: dict[int, Push | None] = field(default_factory=dict)  # None where one was refused
    gradient: Mapping[str, Tensor] = field(default_factory=dict)  # once it is put together
    squared: float = 0.0  # its norm
    images: int = 0  # of all places, also of those with nothing


class Shard:
    """Weights, optimizer and average of some parameters, and the updates that move them."""

    def __init__(self, learner: Updatable, strategy: Held, rules: Rules) -> None:
        self.learner, self.strategy, self.rules = learner, strategy, rules
        self.version = 0  # one more with every update
        self.refused: list[str] = []  # why messages were
        self.live = dict(learner.live)
        self.trained = {n: p for n, p in learner.model.named_parameters() if p.requires_grad}
        self.buffers = {n: b for n, b in self.live.items() if n not in parameters_of(learner)}
        self.pulled = Schema.of(self.live)
        self.pushed = push_schema(self.trained, self.buffers, rules.encoding)
        self._changed = dict.fromkeys(self.live, 0)  # version that each changed in last
        self._waiting: dict[int, Waiting] = {}
        self._over: dict[int, float] = {}  # clock of a complete update: its squared norm here
        self._packed: tuple[int, Bytes] | None = None  # the last pull's version and answer

    # -- reading ------------------------------------------------------------------

    def pull(self, have: int) -> Bytes:
        """Return the weights that changed since version `have`; all for -1.

        Workers that keep step ask for the same, and are given the same bytes: nobody may write
        into them.
        """
        if self._packed is None or self._packed[0] != have:
            chosen = {n: t for n, t in self.live.items() if self._changed[n] > have}
            self._packed = have, pack(self.pulled, chosen, {"version": self.version})
        return self._packed[1]

    # -- gradients ----------------------------------------------------------------

    def push(self, message: Bytes, slot: Slot, worker: str, images: int) -> bool:
        """Take a gradient in; tell whether its update now has all of them.

        Args:
            message: it.
            slot: its place.
            worker: who sends it.
            images: that it is of, whatever else is wrong with it.

        Raises:
            RefusedError: naming the worker; its place in the update counts as filled, with
                nothing.
        """
        waiting = self._waiting.setdefault(slot.clock, Waiting())
        places = waiting.places
        if places.get(slot.place) is not None:
            return len(places) == slot.places
        if slot.place not in places:
            waiting.images += images
        try:
            places[slot.place] = self._read(message)
        except RefusedError as error:
            places[slot.place] = None
            self.refused.append(f"{worker}: refused: {error}")
            if len(self.refused) > 1000:
                del self.refused[0]
            raise RefusedError(f"{worker}: {error}") from error
        finally:
            complete = len(places) == slot.places
        return complete

    def already(self, clock: int) -> float | None:
        """Return the squared norm of an update that is complete; None if it is not.

        Its gradients come again when another server died before it had them.
        """
        return self._over.get(clock)

    def is_complete(self, slot: Slot) -> bool:
        """Tell whether an update has all its gradients and waits to be applied."""
        waiting = self._waiting.get(slot.clock)
        return waiting is not None and len(waiting.places) == slot.places

    def _read(self, message: Bytes) -> Push:
        tensors, meta = unpack(message, self.pushed, copy=False)
        if len(tensors) != len(self.pushed.fields):
            raise RefusedError(f"{len(tensors)} tensors of {len(self.pushed.fields)}")
        counts, version = counts_in(meta, self.learner.task.heads)
        if not meta.get("finite", True):
            raise RefusedError("numbers that are not finite")
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise RefusedError(f"{name.partition('/')[2]}: numbers that are not finite")
        shapes = {n: tuple(p.shape) for n, p in self.trained.items()}
        gradients = self.rules.encoding.decode(under(tensors, GRADIENT), shapes)
        buffers = {BUFFER + name: t for name, t in under(tensors, BUFFER).items()}
        named = {GRADIENT + name: t for name, t in gradients.items()}
        return Push(named | buffers, counts, version)

    # -- updates ------------------------------------------------------------------

    def prepare(self, clock: int) -> float:
        """Put an update's gradient together; return its squared norm, for the other servers.

        Nothing moves yet: other updates may come between this and `apply`.
        """
        waiting, pushes = self._waiting[clock], self._pushes(clock)
        waiting.gradient = {}
        if not pushes or self.rules.elastic:
            return 0.0
        refused = len(waiting.places) - len(pushes)
        for name, gradient in self._aggregated(pushes, refused).items():
            self.trained[name].grad = gradient.to(self.trained[name].dtype)
        self.strategy.divide(self.learner, Loss({}, self._counts(pushes)))
        waiting.squared = float(self.strategy.squared_norm(self.learner.model))
        waiting.gradient = self.gradients()
        self.learner.optimizer.zero_grad(set_to_none=True)
        return waiting.squared

    def apply(self, clock: int, squared: float) -> Applied:
        """Move the weights by what `prepare` put together.

        Args:
            clock: of the update.
            squared: norm of the gradients of all servers.
        """
        pushes, waiting = self._pushes(clock), self._waiting.pop(clock)
        late = max((self.version - push.version for push in pushes), default=0)
        self._over[clock] = waiting.squared
        self.version += 1
        self._packed = None
        if pushes:
            self.learner.begin()
            self._move_buffers(pushes, len(waiting.places))
            if self.rules.elastic:
                self._approach(pushes)
            else:
                self._update(waiting.gradient, squared, late)
        self.learner.step += 1
        self.learner.samples += waiting.images
        return Applied(math.sqrt(squared) if pushes else math.nan, late)  # all were refused

    def _update(self, gradient: Mapping[str, Tensor], squared: float, late: int) -> None:
        for name, value in gradient.items():
            self.trained[name].grad = value
        self.strategy.agreed = torch.tensor(squared, dtype=torch.float64)
        aged = max(1.0, late / self.rules.ages) if self.rules.ages else 1.0
        self.learner.update(self.rules.rate / aged)
        for name in self.trained:
            self._changed[name] = self.version

    def _pushes(self, clock: int) -> list[Push]:
        """Return an update's gradients in the order of their places, whenever they came."""
        places = self._waiting[clock].places
        return [push for _, push in sorted(places.items()) if push is not None]

    def _aggregated(self, pushes: Sequence[Push], refused: int) -> dict[str, Tensor]:
        """Return one gradient: the sum, or what a rule makes of them.

        Those that were refused were wrong ones, of which there are so many fewer.
        """
        names = list(self.trained)
        if self.rules.aggregate == "mean":
            return {name: self._sum(pushes, name) for name in names}
        rows = [torch.stack([p.tensors[GRADIENT + n].flatten() for p in pushes]) for n in names]
        made = AGGREGATES[self.rules.aggregate](rows, max(0, self.rules.faulty - refused))
        return {n: values.view_as(self.trained[n]) for n, values in zip(names, made, strict=True)}

    def _sum(self, pushes: Sequence[Push], name: str) -> Tensor:
        """Add gradients up, in the order of their places, so that sums are rounded alike.

        Into a new tensor: what came lies in a message, and is divided and clipped in place.
        """
        total: Tensor | None = None
        for push in pushes:
            value = push.tensors[GRADIENT + name]
            if self.rules.own_units:
                value = value * max(1.0, push.counts[self.learner.task.head_of(name)])
            total = value if total is None else total + value
        assert total is not None
        return total.clone() if len(pushes) == 1 else total

    def _counts(self, pushes: Sequence[Push]) -> dict[str, Tensor]:
        """Return what the gradient is divided by: by nothing where a rule made it of means."""
        heads = self.learner.task.heads
        if self.rules.aggregate != "mean":
            return {head: torch.ones((), dtype=torch.float64) for head in heads}
        return {
            head: torch.tensor(sum(p.counts[head] for p in pushes), dtype=torch.float64)
            for head in heads
        }

    @torch.no_grad()
    def _move_buffers(self, pushes: Sequence[Push], places: int) -> None:
        """Add what workers changed in them: the mean; of gradients that are alone, their share."""
        share = self.rules.share / places
        for name, buffer in self.buffers.items():
            change = torch.stack([push.tensors[BUFFER + name] for push in pushes]).sum(0)
            if change.any():
                buffer.add_(change.to(buffer.dtype), alpha=share)
                self._changed[name] = self.version

    @torch.no_grad()
    def _approach(self, pushes: Sequence[Push]) -> None:
        """Go some way towards each worker's weights (EASGD, Zhang et al. 2015)."""
        for name, parameter in self.trained.items():
            for push in pushes:
                parameter.add_(push.tensors[GRADIENT + name].to(parameter.dtype))
            self._changed[name] = self.version
        self.learner.average()

    # -- state --------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that this server holds, as `part/name`; not copies."""
        return flat(self.learner.tensors())

    def load(self, state: Mapping[str, Tensor], position: Mapping[str, int]) -> None:
        """Take a state, whole or this server's part of it.

        Args:
            state: as of `state`, with more in it or not.
            position: version, step, samples.
        """
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])
        self.version, self._packed = position["version"], None
        self.learner.step, self.learner.samples = position["step"], position["samples"]
        self._changed = dict.fromkeys(self.live, self.version)
        self._waiting, self._over = {}, {}

    @property
    def position(self) -> dict[str, int]:
        """Return how far this server has come."""
        learner = self.learner
        return {"version": self.version, "step": learner.step, "samples": learner.samples}

    def drop(self) -> None:
        """Drop the gradients of updates that are not complete."""
        self._waiting = {}

    def forget(self) -> None:
        """Drop what is known of updates: the segment that they belong to is over."""
        self._waiting, self._over = {}, {}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of the last update, as the optimizer saw it."""
        return {n: p.grad for n, p in self.trained.items() if p.grad is not None}


def push_schema(
    trained: Mapping[str, Tensor], buffers: Mapping[str, Tensor], encoding: Encoding
) -> Schema:
    """Return what a push to the holder of these tensors holds."""
    with torch.no_grad():
        zeros = {name: torch.zeros_like(t) for name, t in trained.items()}
        sent = {GRADIENT + n: t for n, t in encoding.fresh().encode(zeros).items()}
    return Schema.of(sent | {BUFFER + name: t for name, t in buffers.items()})


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Name a learner's tensors `part/name`, sorted: groups of an optimizer come as they will."""
    named = {f"{part}/{name}": t for part, some in parts.items() for name, t in some.items()}
    return dict(sorted(named.items()))


def parameters_of(learner: Updatable) -> frozenset[str]:
    """Return the names of the parameters a learner holds."""
    return frozenset(name for name, _ in learner.model.named_parameters())


def counts_in(meta: Mapping[str, Any], heads: Sequence[str]) -> tuple[dict[str, float], int]:
    """Return the counts of a push by head, and the version it was computed from.

    Raises:
        RefusedError: they are none.
    """
    counts = meta.get("counts")
    values = [meta.get("version")]
    if not isinstance(counts, dict) or counts.keys() != set(heads):
        raise RefusedError("counts of other heads than the task's")
    if not all(is_count(value) for value in [*counts.values(), *values]):
        raise RefusedError("counts that are none")
    return counts, int(meta["version"])
