"""What keeps one client from deciding for all: caps on what it claims, and on how far it goes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from visiontrain.strategies.federated.algorithms import Named, Update

MOST = 10.0  # medians of a round's counts that a client's may be


def capped(updates: Sequence[Update]) -> tuple[list[Update], list[str]]:
    """Cap counts at ten times the round's median; say whose were.

    A client's count is its weight in the mean, and nobody can check it.
    """
    lines, made = [], []
    for update in updates:
        counts = dict(update.counts)
        for head, count in update.counts.items():
            most = MOST * statistics.median(u.counts[head] for u in updates)
            if count > most > 0:
                counts[head] = most
                lines.append(
                    f"client {update.client}: says that it trained on {count:g} ({head}); counted "
                    f"as {most:g}, {MOST:g} times the median"
                )
        made.append(replace(update, counts=counts))
    return made, lines


def clipped(
    updates: Sequence[Update], now: Named, parameters: frozenset[str], most: float | None
) -> tuple[list[Update], list[str]]:
    """Shorten updates longer than `most` medians of the round's; say whose were.

    Statistics of norms are left as they are.
    """
    if most is None or len(updates) < 2:
        return list(updates), []
    norms = [length(update, now, parameters) for update in updates]
    longest = most * statistics.median(norms)
    made, lines = [], []
    for update, norm in zip(updates, norms, strict=True):
        if norm > longest > 0:
            share = longest / norm
            shorter = {
                n: now[n] + share * (t - now[n]) if n in parameters else t
                for n, t in update.weights.items()
            }
            made.append(replace(update, weights=shorter))
            lines.append(f"client {update.client}: its update, {norm:g} long, cut to {longest:g}")
        else:
            made.append(update)
    return made, lines


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
