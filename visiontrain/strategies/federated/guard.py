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
WILD = 10.0  # times as long as `strategy.clip` lets be: no update is, whatever a client has


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
    updates: Sequence[Update],
    now: Named,
    parameters: frozenset[str],
    most: float | None,
    usual: float = 0.0,
) -> tuple[list[Update], list[str]]:
    """Shorten updates longer than `most` medians of the round's; say whose were.

    SCAFFOLD's variates likewise. Statistics of norms, of three clients or more, go MOST medians:
    momentum lets them go a tenth of their way in one step, so that honest ones are no further.

    Args:
        updates: of a round.
        now: the server's weights.
        parameters: names of those that are trained.
        most: medians; None cuts nothing.
        usual: median length in an earlier round, 0 if there was none: where this round says
            nothing of lengths (one update, or none moved), they may be WILD times as long.
    """
    if most is None:
        return list(updates), []
    lengths = {u.client: length(u, now, parameters) for u in updates}
    middle = _middle(lengths)
    shares = _shares(lengths, most * middle if middle else most * WILD * usual)
    controls = {u.client: _length(u.control) for u in updates}
    variates = _shares(controls, most * _middle(controls))
    moved = {u.client: _statistics(u, now, parameters) for u in updates}
    statistics = _shares(moved, MOST * _middle(moved) if len(moved) > 2 else 0.0)
    made, lines = [], []
    for update in updates:
        k, control, weights = update.client, update.control, dict(update.weights)
        for name, tensor in update.weights.items():
            share = shares[k] if name in parameters else statistics[k]
            if share < 1:  # a variance stays one: it ends between two
                weights[name] = now[name] + share * (tensor - now[name])
        if shares[k] < 1:
            lines.append(f"client {k}: its update cut to {shares[k]:.2g} of its length")
        if variates[k] < 1:
            control = {n: variates[k] * t for n, t in control.items()}
            lines.append(f"client {k}: its variate cut to {variates[k]:.2g} of its length")
        if statistics[k] < 1:
            lines.append(f"client {k}: its statistics of norms cut to {statistics[k]:.2g}")
        made.append(replace(update, weights=weights, control=control, counted=variates[k]))
    return made, lines


def _statistics(update: Update, now: Named, parameters: frozenset[str]) -> float:
    """Return how far a client's statistics of norms went, in fp64."""
    return _length(
        {n: t.double() - now[n].double() for n, t in update.weights.items() if n not in parameters}
    )


def _middle(lengths: Mapping[int, float]) -> float:
    """Return the median of lengths; 0 of one alone, which says nothing of itself."""
    return median_low(lengths.values()) if len(lengths) > 1 else 0.0


def _shares(lengths: Mapping[int, float], longest: float) -> dict[int, float]:
    """Return what is left of each length, at most 1; all of it where none is known to be long."""
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
