"""What the server of a federated run makes of its clients' weights; knows no engine.

K clients take part in a round. x are the server's weights, y_k a client's after it trained, p_k
its weight: its share of the counts that losses are divided by, of the head that a parameter
answers to. So one full batch of plain SGD on every client is one such step on all their data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from visiontrain.strategies.aggregate import AGGREGATES, distances
from visiontrain.strategies.federated.config import Federated

Named = Mapping[str, Tensor]
HeadOf = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Update:
    """What a client made of the server's weights."""

    client: int
    weights: Named  # after training: what is shared
    counts: Mapping[str, float]  # by head: what its losses were divided by, summed over its steps
    steps: float = 1.0  # FedNova's: how many plain steps its way amounts to
    control: Named = field(default_factory=dict)  # SCAFFOLD's: how its variate changed
    counted: float = 1.0  # the share of that which `control` is, where it was too long


class Algorithm(Protocol):
    """Turns updates into the server's next weights."""

    def state(self) -> dict[str, Tensor]:
        """Return what rounds leave for later ones, by name; not copies."""
        ...

    def start(self, now: Named) -> None:
        """Begin a run at these weights."""
        ...

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Return the weights after a round.

        Args:
            now: the server's, parameters and float buffers (statistics of norms).
            updates: of one client or more, in the order of their numbers.
            head_of: names the head whose count a tensor answers to.
        """
        ...


def shares(updates: Sequence[Update], head: str) -> list[float]:
    """Return the clients' weights p_k; equal ones if no client has counted anything."""
    counts = [update.counts[head] for update in updates]
    total = sum(counts)
    return [count / total if total else 1 / len(updates) for count in counts]


def mean(updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
    """Return the weighted mean of the clients' weights; in fp64, so that one client's stay as is.

    McMahan et al. 2017 (arXiv 1602.05629).
    """
    return {
        name: weighted([u.weights[name] for u in updates], shares(updates, head_of(name)))
        for name in updates[0].weights
    }


def weighted(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors, in their own type."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(tensors[0].dtype)


@dataclass(slots=True)
class FedAvg:
    """The weighted mean, and, with momentum, on as the server went before (FedAvgM).

    Hsu et al. 2019 (arXiv 1909.06335). Statistics of norms are averaged plainly in all algorithms.
    """

    parameters: frozenset[str]
    lr: float = 1.0  # of the server
    momentum: float = 0.0
    _moved: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """Return the momentum."""
        return {f"momentum/{name}": tensor for name, tensor in self._moved.items()}

    def start(self, now: Named) -> None:
        """Begin without momentum."""
        if self.momentum:
            self._moved = zeros(now, self.parameters)

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Move by the mean."""
        found = mean(updates, head_of)
        if self.lr == 1 and not self.momentum:
            return found
        for name in found.keys() & self.parameters:
            way = found[name] - now[name]
            if self.momentum:
                way = self._moved[name].mul_(self.momentum).add_(way)
            found[name] = now[name] + self.lr * way
        return found


@dataclass(slots=True)
class Adaptive:
    """An optimizer on the server whose gradient is how far clients went (Reddi et al. 2021).

    arXiv 2003.00295, algorithm 2: m = b1 m + (1 - b1) d, v by `kind`, x += lr m / (sqrt(v) + tau).
    """

    parameters: frozenset[str]
    kind: str  # adam, yogi, adagrad
    lr: float
    betas: tuple[float, float]
    tau: float
    _first: dict[str, Tensor] = field(default_factory=dict)
    _second: dict[str, Tensor] = field(default_factory=dict)

    def state(self) -> dict[str, Tensor]:
        """Return both moments."""
        first = {f"first/{name}": tensor for name, tensor in self._first.items()}
        return first | {f"second/{name}": tensor for name, tensor in self._second.items()}

    def start(self, now: Named) -> None:
        """Begin with no way and the least second moment."""
        self._first, self._second = zeros(now, self.parameters), zeros(now, self.parameters)
        for tensor in self._second.values():
            tensor.fill_(self.tau**2)

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Move parameters by the moments."""
        found = mean(updates, head_of)
        for name in found.keys() & self.parameters:
            way = found[name] - now[name]
            first = self._first[name].mul_(self.betas[0]).add_(way, alpha=1 - self.betas[0])
            second = self._moment(self._second[name], way.square())
            found[name] = now[name] + self.lr * first / (second.sqrt() + self.tau)
        return found

    def _moment(self, second: Tensor, square: Tensor) -> Tensor:
        share = 1 - self.betas[1]
        if self.kind == "adam":
            return second.mul_(self.betas[1]).add_(square, alpha=share)
        if self.kind == "yogi":
            return second.sub_(share * square * torch.sign(second - square))
        return second.add_(square)


@dataclass(slots=True)
class Scaffold:
    """The mean, while each client's steps are corrected for where its data pull it.

    Karimireddy et al. 2020 (arXiv 1910.06378), whose clients count alike: c += sum of what the
    clients' variates changed / N. Here they count by their data, in the mean as in the variate:
    where both differ, the rest point is that of neither. c is the sum of n_k c_k / (N mean n), n_k
    being a client's counts when it first took part, beside those of clients that were known: it
    stays that sum for ever, whoever takes part in a round.
    """

    parameters: frozenset[str]
    clients: int  # N, of whom some take part in a round
    lr: float = 1.0
    control: dict[str, Tensor] = field(default_factory=dict)  # c
    counts: dict[int, float] = field(default_factory=dict)  # n_k, which a server saves, too

    def state(self) -> dict[str, Tensor]:
        """Return the server's variate."""
        return {f"control/{name}": tensor for name, tensor in self.control.items()}

    def start(self, now: Named) -> None:
        """Begin without correction."""
        self.control = zeros(now, self.parameters)

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Move by the mean, and the variate by the clients'."""
        before = self._whole()
        self._meet(updates)
        whole = self._whole()
        for name, tensor in self.control.items():
            tensor.mul_(before / whole if before else 1.0)
            for update in updates:
                tensor.add_(update.control[name], alpha=self.counts[update.client] / whole)
        return FedAvg(self.parameters, self.lr).step(now, updates, head_of)

    def _meet(self, updates: Sequence[Update]) -> None:
        """Note what newcomers count: a detector's losses are divided by more as it learns."""
        told = {u.client: max(1.0, sum(u.counts.values())) for u in updates}
        known = [client for client in told if client in self.counts]
        unit = sum(self.counts[k] for k in known) / sum(told[k] for k in known) if known else 1.0
        for client in told.keys() - self.counts.keys():
            self.counts[client] = told[client] * unit

    def _whole(self) -> float:
        """Return N times the mean of n_k; 0 where nobody is known."""
        if not self.counts:
            return 0.0
        everybody = max(self.clients, len(self.counts))
        return everybody * sum(self.counts.values()) / len(self.counts)


@dataclass(slots=True)
class FedNova:
    """Clients who made more steps count no more for it (Wang et al. 2020, arXiv 2007.07481).

    d_k = (y_k - x) / a_k, x += (sum of p_k a_k) (sum of p_k d_k).
    """

    parameters: frozenset[str]

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def start(self, now: Named) -> None:
        """Keep nothing."""

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Move by the mean step, as often as the clients did on average."""
        found = mean(updates, head_of)
        for name in found.keys() & self.parameters:
            weights = shares(updates, head_of(name))
            often = sum(p * u.steps for p, u in zip(weights, updates, strict=True))
            each = [p * often / u.steps for p, u in zip(weights, updates, strict=True)]
            ways = [u.weights[name].double() - now[name].double() for u in updates]
            found[name] = (now[name].double() + weighted(ways, each)).to(now[name].dtype)
        return found


@dataclass(slots=True)
class Robust:
    """A rule that holds when some clients send anything at all; every client counts alike."""

    kind: str  # a key of RULES
    faulty: int
    chosen: int | None = None  # for multi_krum: how many are averaged

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def start(self, now: Named) -> None:
        """Keep nothing."""

    def step(self, now: Named, updates: Sequence[Update], head_of: HeadOf) -> dict[str, Tensor]:
        """Apply the rule to the ways, in fp64."""
        del head_of
        names = list(updates[0].weights)
        rows = [
            torch.stack([(u.weights[n].double() - now[n].double()).flatten() for u in updates])
            for n in names
        ]
        ways = RULES[self.kind](rows, self.faulty, self.chosen)
        return {
            n: (now[n].double() + way.view_as(now[n])).to(now[n].dtype)
            for n, way in zip(names, ways, strict=True)
        }


def multi_krum(parts: Sequence[Tensor], faulty: int, chosen: int | None) -> list[Tensor]:
    """Return the mean of those whose nearest others are nearest (Blanchard et al. 2017)."""
    clients = len(parts[0])
    most = clients - faulty
    best = krum_scores(parts, faulty).argsort(stable=True)[: min(chosen or most, most)]
    return [rows[best].mean(0) for rows in parts]


def bulyan(parts: Sequence[Tensor], faulty: int, chosen: int | None) -> list[Tensor]:
    """Choose by Krum, one after the other, then average what is nearest each number's median.

    El Mhamdi et al. 2018 (arXiv 1802.07927): K - 2 f are chosen, K - 4 f of their numbers averaged.
    """
    del chosen
    clients = len(parts[0])
    left, taken = list(range(clients)), list[int]()
    while len(taken) < clients - 2 * faulty:
        among = [rows[left] for rows in parts]
        taken.append(left.pop(int(krum_scores(among, faulty).argmin())))
    made = []
    for rows in parts:
        own = rows[taken]
        middle = own.median(dim=0).values
        nearest = (own - middle).abs().argsort(dim=0, stable=True)[: max(1, clients - 4 * faulty)]
        made.append(own.gather(0, nearest).mean(0))
    return made


def krum_scores(parts: Sequence[Tensor], faulty: int) -> Tensor:
    """Return Krum's scores (K,): squared distances to the K - faulty - 2 nearest others."""
    square = torch.stack([distances(rows) for rows in parts]).sum(0)
    square.fill_diagonal_(torch.inf)
    return square.sort(dim=1).values[:, : max(1, len(square) - faulty - 2)].sum(1)


def _plain(name: str) -> Callable[[Sequence[Tensor], int, int | None], list[Tensor]]:
    return lambda parts, faulty, _: AGGREGATES[name](parts, faulty)


RULES: dict[str, Callable[[Sequence[Tensor], int, int | None], list[Tensor]]] = {
    "median": _plain("median"),
    "trimmed_mean": _plain("trimmed_mean"),
    "krum": _plain("krum"),
    "multi_krum": multi_krum,
    "bulyan": bulyan,
}


def zeros(tensors: Named, names: frozenset[str]) -> dict[str, Tensor]:
    """Return zeros like some of the tensors."""
    return {name: torch.zeros_like(t) for name, t in tensors.items() if name in names}


def algorithm_of(config: Federated, parameters: frozenset[str]) -> Algorithm:
    """Make what a config names."""
    kind, rate = config.algorithm, config.server_rate
    if kind == "fedavgm":
        return FedAvg(parameters, rate, config.server_momentum)
    if kind in {"fedadam", "fedyogi", "fedadagrad"}:
        betas = (config.server_momentum, config.server_beta2)
        return Adaptive(parameters, kind.removeprefix("fed"), rate, betas, config.tau)
    if kind == "scaffold":
        return Scaffold(parameters, config.clients, rate)
    if kind == "fednova":
        return FedNova(parameters)
    if kind in RULES:
        return Robust(kind, config.faulty, config.chosen)
    return FedAvg(parameters, rate)
