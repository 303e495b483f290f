"""What a federated run counts: who took part, how far they went, what travelled, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visiontrain.strategies.federated.algorithms import Named, Update
from visiontrain.strategies.federated.guard import way_of
from visiontrain.strategies.tensor_message import number_of

COUNTED = ("down", "up", "late", "failed", "refused", "trained_s", "engine_s")


@dataclass(frozen=True, slots=True)
class Ways:
    """How clients' updates lie to each other."""

    lengths: Mapping[int, float]  # by client
    cosines: Mapping[int, float]  # to the mean of all, by client

    @property
    def length(self) -> float:
        """Return the mean length."""
        return sum(self.lengths.values()) / len(self.lengths)


def of_round(updates: Sequence[Update], now: Named, parameters: frozenset[str]) -> Ways:
    """Compare the updates of a round: their lengths, their directions to the plain mean's."""
    # One after the other, twice: all at once, they are as many models.
    middle = way_of(updates[0], now, parameters)
    for update in updates[1:]:
        middle += way_of(update, now, parameters)
    lengths, cosines = dict[int, float](), dict[int, float]()
    for update in updates:
        way = way_of(update, now, parameters)
        lengths[update.client] = float(torch.linalg.vector_norm(way))
        cosines[update.client] = _cosine(way, middle)
    return Ways(lengths, cosines)


def _cosine(a: Tensor, b: Tensor) -> float:
    size = float(torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b))
    return float(a @ b) / size if size else 0.0


@dataclass(slots=True)
class Rounds:
    """The whole run's, and the newest round's."""

    down: int = 0  # bytes to clients
    up: int = 0  # bytes from them
    late: int = 0  # results that did not come in time
    failed: int = 0  # clients that said why they could not train
    refused: int = 0  # results that could be none
    trained_s: float = 0.0  # seconds that clients trained, all together
    engine_s: float = 0.0  # seconds of rounds in which none can have
    taken: dict[int, int] = field(default_factory=dict)  # rounds that each client was part of
    newest: dict[int, int] = field(default_factory=dict)  # number of the last of them
    counted: dict[int, float] = field(default_factory=dict)  # of SCAFFOLD's variate then, a share
    weighs: dict[int, float] = field(default_factory=dict)  # what each counts in SCAFFOLD's variate
    stale: set[int] = field(default_factory=set)  # whose variates are of an earlier algorithm
    images: dict[int, int] = field(default_factory=dict)  # that each has
    classes: dict[int, list[int]] = field(default_factory=dict)  # images by their main class
    lengths: dict[int, float] = field(default_factory=dict)  # of the newest round
    cosines: dict[int, float] = field(default_factory=dict)
    local: dict[int, float] = field(default_factory=dict)  # scores of clients' own weights
    common: dict[int, float] = field(default_factory=dict)  # of the server's, on their images
    _times: list[float] = field(default_factory=list)  # of the newest round

    def note(self, number: int, clients: Sequence[int], metas: Sequence[Mapping[str, Any]]) -> None:
        """Note who took part in a round."""
        self._times = []
        for client, meta in zip(clients, metas, strict=True):
            self.taken[client] = self.taken.get(client, 0) + 1
            self.newest[client] = number
            self.stale.discard(client)
            self.images[client] = int(number_of(meta.get("own_images")) or 0)
            self._times.append(abs(number_of(meta.get("seconds")) or 0.0))
            score = number_of(meta.get("score"))
            if score is not None:
                self.local[client] = score
        self.trained_s += sum(self._times)

    def cut(self, updates: Sequence[Update]) -> None:
        """Note what was counted of how clients' variates changed."""
        for update in updates:
            self.counted.pop(update.client, None)
            if update.counted < 1:
                self.counted[update.client] = update.counted

    def forget(self, *, variates: bool) -> None:
        """Go on as if no client had kept anything, or none a variate."""
        self.counted.clear()
        self.weighs.clear()
        if variates:
            self.stale |= self.newest.keys()
        else:
            self.newest.clear()

    def ways(self, ways: Ways, seconds: float, at_once: int) -> None:
        """Note how far clients went, in a round of so many seconds."""
        self.lengths, self.cosines = dict(ways.lengths), dict(ways.cosines)
        # As fast as it can have been: side by side, or one long one.
        least = max(*self._times, sum(self._times) / at_once)
        self.engine_s += max(0.0, seconds - least)

    def scored(self, found: Mapping[int, Mapping[str, Any]]) -> None:
        """Note what clients say of the server's weights."""
        scores = {k: number_of(meta.get("score")) for k, meta in sorted(found.items())}
        # Who has no image to score on, or none with a box, has no score.
        self.common = {k: score for k, score in scores.items() if score is not None}

    def numbers(self) -> dict[str, float]:
        """Return columns of results.csv."""
        spread = _spread(self.lengths.values())
        scored = {"worst_client": min(self.common.values())} if self.common else {}
        return {
            "clients": len(self.lengths),
            "bytes_down": self.down,
            "bytes_up": self.up,
            "drift": sum(self.lengths.values()) / max(1, len(self.lengths)),
            "drift_spread": spread,
            "cosine": sum(self.cosines.values()) / max(1, len(self.cosines)),
            **scored,
        }

    def summary(self) -> dict[str, Any]:
        """Return what metrics.json says, from which `load` goes on."""
        clients = {
            str(k): {
                "images": self.images.get(k, sum(self.classes.get(k, []))),
                **({"classes": self.classes[k]} if k in self.classes else {}),
                "rounds": self.taken.get(k, 0),
                "newest_round": self.newest.get(k),
                **({"counted": self.counted[k]} if k in self.counted else {}),
                **({"weighs": self.weighs[k]} if k in self.weighs else {}),
                **({"stale": True} if k in self.stale else {}),
                "drift": self.lengths.get(k),
                "cosine": self.cosines.get(k),
                "own_score": self.local.get(k),
                "common_score": self.common.get(k),
            }
            for k in sorted(self.taken.keys() | self.classes.keys())
        }
        scored = {}
        if self.common:
            values = self.common.values()
            scored = {
                "worst_client": min(values),
                "mean_client": sum(values) / len(values),
                "client_spread": _spread(values),
            }
        counted = {f"clients_{name}": getattr(self, name) for name in COUNTED}
        return {"clients": clients, **scored, **counted}

    def load(self, summary: Mapping[str, Any]) -> None:
        """Go on counting from what `summary` returned, of this mode or another."""
        if "clients_down" not in summary:
            return
        for name in COUNTED:
            setattr(self, name, summary[f"clients_{name}"])
        kept = (
            (self.newest, "newest_round"),
            (self.counted, "counted"),
            (self.weighs, "weighs"),
            (self.lengths, "drift"),
            (self.cosines, "cosine"),
            (self.local, "own_score"),
            (self.common, "common_score"),
        )
        for key, own in summary["clients"].items():
            k = int(key)
            self.images[k] = own["images"]
            if own["rounds"]:
                self.taken[k] = own["rounds"]
            if own.get("stale"):
                self.stale.add(k)
            for into, name in kept:
                if own.get(name) is not None:
                    into[k] = own[name]


def _spread(values: Any) -> float:
    """Return the standard deviation over clients."""
    found = list(values)
    if len(found) < 2:
        return 0.0
    middle = sum(found) / len(found)
    return math.sqrt(sum((value - middle) ** 2 for value in found) / (len(found) - 1))
