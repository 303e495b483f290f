"""What keeps one client from deciding for all: caps on what it claims, and on how far it goes.

Of two updates nobody can say which is the wrong one; caps are then of the lower.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median_low

import torch
from torch import Tensor

from visiontrain.strategies.federated.algorithms import Named, Update

MOST = 10.0  # medians of a round's counts that a client's may be, and of steps the least share


def capped(updates: Sequence[Update]) -> tuple[list[Update], list[str]]:
    """Cap counts at ten times the round's median, and steps at both ends; say whose were.

    A client's counts are its weight in the mean, and nobody can check them.
    """
    lines, made = [], []
    steps = median_low(update.steps for update in updates)
    for update in updates:
        counts = dict(update.counts)
        for head, count in update.counts.items():
            most = MOST * median_low(u.counts[head] for u in updates)
            if count > most > 0:
                counts[head] = most
                lines.append(
                    f"client {update.client}: says that it trained on {count:g} ({head}); counted "
                    f"as {most:g}, {MOST:g} times the median"
                )
        made.append(
            replace(update, counts=counts, steps=min(max(update.steps, steps / MOST), steps * MOST))
        )
    return made, lines


def clipped(
    updates: Sequence[Update], now: Named, parameters: frozenset[str], most: float | None
) -> tuple[list[Update], list[str]]:
    """Shorten updates longer than `most` medians of the round's; say whose were.

    SCAFFOLD's variates likewise. Statistics of norms are left as they are.
    """
    if most is None or len(updates) < 2:
        return list(updates), []
    shares = _shares({u.client: length(u, now, parameters) for u in updates}, most)
    variates = _shares({u.client: _length(u.control) for u in updates}, most)
    made, lines = [], []
    for update in updates:
        share, other = shares[update.client], variates[update.client]
        weights, control = update.weights, update.control
        if share < 1:
            weights = {
                n: now[n] + share * (t - now[n]) if n in parameters else t
                for n, t in weights.items()
            }
            lines.append(f"client {update.client}: its update cut to {share:.2g} of its length")
        if other < 1:
            control = {n: other * t for n, t in control.items()}
            lines.append(f"client {update.client}: its variate cut to {other:.2g} of its length")
        made.append(replace(update, weights=weights, control=control, counted=other))
    return made, lines


def _shares(lengths: Mapping[int, float], most: float) -> dict[int, float]:
    """Return what is left of each length, at most 1."""
    longest = most * median_low(lengths.values())
    return {k: longest / own if own > longest > 0 else 1.0 for k, own in lengths.items()}


def _length(tensors: Named) -> float:
    norms = [torch.linalg.vector_norm(tensor.double()) for tensor in tensors.values()]
    return float(torch.stack(norms).square().sum().sqrt()) if norms else 0.0


def length(update: Update, now: Named, parameters: frozenset[str]) -> float:
    """Return how far a client's parameters went, in fp64."""
    return float(torch.linalg.vector_norm(way_of(update, now, parameters)))


def way_of(update: Update, now: Named, parameters: frozenset[str]) -> Tensor:
    """Return where a client's parameters went, flat (P,), in fp64."""
    ways = [
        (tensor.double() - now[name].double()).flatten()
        for name, tensor in update.weights.items()
        if name in parameters
    ]
    return torch.cat(ways) if ways else torch.zeros(1, dtype=torch.float64)
