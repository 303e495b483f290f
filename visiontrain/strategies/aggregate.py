"""Robust aggregation: rules for the case that some ranks send wrong gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.futures import Future

from visiontrain.strategies.exchange import Bucket, Memory, Units
from visiontrain.strategies.wire import Wire, pending

# Takes parts of the gradients of all ranks, each (W, N), and how many of the ranks may be wrong;
# returns the parts of one gradient, each (N,).
Rule = Callable[[Sequence[Tensor], int], list[Tensor]]


def mean(parts: Sequence[Tensor], faulty: int) -> list[Tensor]:
    """Return the mean: one wrong rank moves it as far as it likes."""
    del faulty
    return [rows.mean(0) for rows in parts]


def median(parts: Sequence[Tensor], faulty: int) -> list[Tensor]:
    """Return each number's median, between the middle two of an even count.

    Yin et al. 2018 (arXiv 1803.01498). Holds while fewer than half of the ranks are wrong.
    """
    del faulty
    return [_middle(rows, (len(rows) - 1) // 2) for rows in parts]


def trimmed_mean(parts: Sequence[Tensor], faulty: int) -> list[Tensor]:
    """Return each number's mean without the `faulty` lowest and highest (Yin et al. 2018)."""
    return [_middle(rows, faulty) for rows in parts]


def krum(parts: Sequence[Tensor], faulty: int) -> list[Tensor]:
    """Return the gradient of the rank whose nearest others are nearest.

    Blanchard et al. 2017 (arXiv 1703.02757): the sum of squared distances to the W - faulty - 2
    nearest ranks. Proven for W > 2 * faulty + 2; W = faulty + 3 is the least that means anything.
    """
    world = len(parts[0])
    square = torch.stack([distances(rows) for rows in parts]).sum(0)
    square = square.nan_to_num(nan=torch.inf, posinf=torch.inf)
    square.fill_diagonal_(torch.inf)  # not near itself
    nearest = square.sort(dim=1).values[:, : world - faulty - 2]
    best = nearest.sum(1).argmin()
    return [rows[best] for rows in parts]


def _middle(rows: Tensor, cut: int) -> Tensor:
    """Return the mean (N,) without the `cut` lowest and highest; what is no number is highest."""
    ordered = rows.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(dim=0).values
    return ordered[cut : len(rows) - cut].mean(0)


def distances(rows: Tensor) -> Tensor:
    """Return squared distances (W, W); by differences, as products would cancel."""
    return torch.stack([(rows - row).square().sum(1) for row in rows])


AGGREGATES: dict[str, Rule] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
}


@dataclass(slots=True)
class Robust:
    """Gathers all gradients on every rank, each divided by its rank's own counts, and judges.

    Not by the whole batch's: a wrong rank could lie about its counts as well.
    """

    wire: Wire
    name: str  # of the rule
    faulty: int
    half: torch.dtype | None = None  # what travels, if not the gradients' own format
    units: Units = "own"
    memories: Mapping[str, Memory] = field(default_factory=dict)
    _gathered: list[Tensor] = field(default_factory=list)  # a bucket each, (W, N)
    _wanted: list[Future[Tensor]] = field(default_factory=list)

    def reduce(self, bucket: Bucket) -> Future[Tensor]:
        """Gather; with the last bucket, as a rule may need all, say what comes of each."""
        sent = bucket.buffer if self.half is None else bucket.buffer.to(self.half)
        self._gathered.append(self.wire.gather(sent).to(bucket.buffer.dtype))
        self._wanted.append(pending(bucket.buffer.device))
        future = self._wanted[-1]
        if bucket.last:
            values = AGGREGATES[self.name](self._gathered, self.faulty)
            for wanted, value in zip(self._wanted, values, strict=True):
                wanted.set_result(value)
            self._gathered, self._wanted = [], []
        return future
