"""How a client trains: as one device does, with what an algorithm adds to each step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visiontrain.core.interfaces import Updatable
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.precision import Precision

Named = Mapping[str, Tensor]


class Local(Strategy):
    """One device's training, whose steps are counted and may be pulled somewhere."""

    def __init__(
        self,
        place: Place,
        precision: Precision,
        *,
        prox: float = 0.0,
        momentum: float = 0.0,
        nesterov: bool = True,
    ) -> None:
        """Train in one process.

        Args:
            place: of this process.
            precision: what it computes in.
            prox: pull towards the weights that the round began with (FedProx, Li et al. 2020).
            momentum: of the optimizer, for FedNova's count; 0 where it has none of SGD's.
            nesterov: whether that looks ahead.
        """
        super().__init__(place, precision)
        self._prox, self._momentum, self._nesterov = prox, momentum, nesterov
        self._correction: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}  # by head: what losses were divided by, added up
        self.terms: dict[str, float] = {}  # sums of the loss
        self.norm = 0.0  # of the last gradient
        self.plain_steps = 0.0  # FedNova's: the sum of what each step's gradient counts in the end
        self.rates = 0.0  # the sum of learning rates
        self._pace = 0.0

    def begin(self, learner: Updatable, correction: Named) -> None:
        """Begin a round at the weights that the learner holds.

        Args:
            learner: that trains.
            correction: SCAFFOLD's c - c_k, for some parameters; empty without.
        """
        self._correction = dict(correction)
        named = learner.model.named_parameters()
        self._start = {n: p.detach().clone() for n, p in named if self._prox and p.requires_grad}

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        loss = super().forward_backward(learner, micro_batches)
        counts = {head: max(1.0, count.item()) for head, count in loss.counts.items()}
        self.counts = dict.fromkeys(counts, 0.0) | self.counts
        terms = {name: value.item() for name, value in loss.terms.items()}
        if not all(map(math.isfinite, terms.values())):  # the step will change nothing
            return loss
        for head, count in counts.items():
            self.counts[head] += count
        for name, value in terms.items():  # sums again: clients' are added up
            self.terms[name] = self.terms.get(name, 0.0) + value * counts[name.split("/")[0]]
        return loss

    @torch.no_grad()
    def apply(self, learner: Updatable) -> Tensor:
        """Pull, step, correct.

        SCAFFOLD's correction comes after the optimizer's step, at its rate, and not through its
        moments: variates are differences of weights over rates (Karimireddy et al. 2020, eq. 4).
        """
        named = dict(learner.model.named_parameters())
        for name, start in self._start.items():
            gradient = named[name].grad
            if gradient is not None:
                gradient.add_(named[name] - start, alpha=self._prox)
        norm = learner.update()
        good = float(torch.isfinite(norm))
        for name, correction in self._correction.items():
            named[name].sub_(correction, alpha=learner.lr * good)
        self.norm = norm.item()
        self.rates += learner.lr * good
        if good:  # a step is g + m g' + ..., and with Nesterov's momentum g + m (g + m g' + ...)
            self._pace = self._momentum * self._pace + 1
            ahead = self._nesterov and self._momentum
            self.plain_steps += 1 + self._momentum * self._pace if ahead else self._pace
        return norm
