"""A worker of a run: it takes units, reads the weights, makes gradients and pushes them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from visiontrain.core.interfaces import Updatable
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.parameter_server.ledger import Slot, Unit
from visiontrain.strategies.parameter_server.talk import LostError, Part, Talk
from visiontrain.strategies.precision import Precision


class Computing(Strategy):
    """A worker's side of the mode: gradients go to the servers, which apply them."""

    def __init__(self, place: Place, precision: Precision, talk: Talk, shares: int) -> None:
        super().__init__(place, precision)
        self.talk, self._shares = talk, shares
        self._loss, self._images = Loss({}, {}), 0
        self._read: dict[str, Tensor] = {}  # float buffers as they were read

    def cell(self, micro_batch: int) -> int:
        return micro_batch * self._shares + self.talk.unit.share

    def renew(self, learner: Updatable) -> None:
        """Do nothing: weights are read before each gradient."""

    @torch.no_grad()
    def begin(self, learner: Updatable, unit: Unit, images: int) -> None:
        """Wait until this worker may read the weights for a unit, and read them."""
        learner.samples, learner.step, self._images = self.talk.start(unit), unit.step, images
        # What the last gradient did to buffers: servers send only what an update has changed.
        for name, value in (self._read | self.talk.pull()).items():
            learner.live[name].copy_(value)
        held = (buffer for part in self.talk.buffers for buffer in part.items())
        self._read = {name: buffer.clone() for name, buffer in held}

    def divide(self, learner: Updatable, loss: Loss) -> Loss:
        """Leave it to the servers, who know the other shares."""
        self._loss = loss  # sums, for the driver
        return super().divide(learner, loss) if self.talk.terms.own_units else loss

    def apply(self, learner: Updatable) -> Tensor:
        """Push; return zero, as only the servers know the norm."""
        slot = self.talk.slot()
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for part in self.talk.trained
            for name, p in part.items()
        }
        changes = {n: learner.live[n] - before for n, before in self._read.items()}
        self.talk.push(slot, Part(self._loss, self._images, self._images, gradients, changes))
        return torch.zeros(())


class Elastic(Strategy):
    """`easgd`: a worker trains weights of its own, and now and then they and the center meet.

    Zhang, Choromanska and LeCun 2015 (arXiv 1412.6651): x -= d, center += d, d = a (x - center).
    """

    def __init__(
        self, place: Place, precision: Precision, talk: Talk, shares: int, every: int, pull: float
    ) -> None:
        super().__init__(place, precision)
        self.talk, self._shares = talk, shares
        self._every, self._pull = every, pull
        self._loss, self._images = Loss({}, {}), 0
        self._center: dict[str, Tensor] = {}  # as it was last read
        self._since = (0, 0)  # units and images since weights met

    def cell(self, micro_batch: int) -> int:
        return micro_batch * self._shares + self.talk.unit.share

    @torch.no_grad()
    def renew(self, learner: Updatable) -> None:
        """Begin again at the center: it was loaded, or a server with a part of it died."""
        self._center, self._since = {}, (0, 0)
        for state in learner.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()

    @torch.no_grad()
    def begin(self, learner: Updatable, unit: Unit, images: int) -> None:
        """Wait for nobody; the first weights are the center's."""
        learner.samples, learner.step, self._images = self.talk.start(unit), unit.step, images
        if not self._center:
            self._center = self._pulled(learner)
            for name, value in self._center.items():
                learner.live[name].copy_(value)

    def divide(self, learner: Updatable, loss: Loss) -> Loss:
        self._loss = Loss(loss.terms, loss.counts)
        return super().divide(learner, loss)

    def apply(self, learner: Updatable) -> Tensor:
        """Step, and meet the center when it is time."""
        norm, slot = learner.update(), self.talk.slot()
        units, images = self._since
        self._since = (units + 1, images + self._images)
        if units + 1 < self._every:
            nowhere = slot._replace(places=0)  # servers hear nothing of it
            self.talk.done(nowhere, self._loss, self._images, {"norm": norm.item()})
        else:
            self._meet(learner, slot, norm.item())
            self._since = (0, 0)
        return norm

    def _pulled(self, learner: Updatable) -> dict[str, Tensor]:
        """Read the center, which comes on the CPU."""
        center = self.talk.pull()
        return {name: value.to(learner.live[name].device) for name, value in center.items()}

    @torch.no_grad()
    def _meet(self, learner: Updatable, slot: Slot, norm: float) -> None:
        self._center |= self._pulled(learner)
        way = {n: self._pull * (learner.live[n] - value) for n, value in self._center.items()}
        for name, part in way.items():
            learner.live[name].sub_(part)
        part = Part(self._loss, self._images, self._since[1], way, way, norm)
        self.talk.push(slot, part)


def work(
    learner: Updatable,
    strategy: Computing | Elastic,
    source: Callable[[Iterator[Unit]], Iterator[Sequence[Batch]]],
    step: Callable[[Sequence[Batch]], None],
    rows: Callable[[int, Batch], Sequence[Sequence[float]]] | None = None,
) -> None:
    """Work until the run is over.

    Args:
        learner: that trains here.
        strategy: its own.
        source: yields the micro-batches of units, in their order.
        step: makes and pushes a gradient: `train_step`.
        rows: fingerprints of a batch of a step, where they are asked for.
    """
    talk = strategy.talk
    talk.learn(learner)
    while (era := talk.link.hub("segment", talk.name)) is not None:
        if era != talk.era:
            talk.forget()
            talk.era = era
            strategy.renew(learner)
        claimed: deque[Unit] = deque()
        for batches in source(_claims(talk, claimed)):
            unit = claimed.popleft()
            images = sum(int(batch.valid.sum()) for batch in batches)
            if rows is not None:
                talk.rows = [row for batch in batches for row in rows(unit.step, batch)]
            try:
                strategy.begin(learner, unit, images)
                step(batches)
            except LostError:
                continue


def _claims(talk: Talk, claimed: deque[Unit]) -> Iterator[Unit]:
    while (unit := talk.link.hub("claim", talk.name, talk.era)) is not None:
        claimed.append(Unit(*unit))
        yield claimed[-1]
