"""The order in which shards are read: shards at random, then rows at random in a few of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Rows that lie in S shards, read some shards at a time; pure functions of (seed, epoch).

    Disks and caches of remote files serve a few shards well at once, and all of them badly.
    """

    starts: Rows  # (S + 1,), ascending: the rows of shard s are starts[s] : starts[s + 1]
    shards: int  # read at a time; windows are made even, so it may be one less

    def numbers(self, rows: Rows, seed: int, epoch: int) -> Rows:
        """Return the window (N,) in which each of `rows` (N,) is read in `epoch`."""
        place = np.argsort(self._shuffled(seed, epoch))
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        return np.searchsorted(self._bounds(), place[shards], side="right") - 1

    def around(self, row: int, seed: int, epoch: int) -> Rows:
        """Return the shards (K,) that are read together with `row` in `epoch`."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        order = self._shuffled(seed, epoch)
        place = int(np.flatnonzero(order == shard)[0])
        bounds = self._bounds()
        window = int(np.searchsorted(bounds, place, side="right")) - 1
        return order[bounds[window] : bounds[window + 1]]

    def draw(self, row: int, seed: int, epoch: int, random: np.random.Generator, size: int) -> Rows:
        """Draw `size` rows from those that are read together with `row` in `epoch`."""
        window = self.around(row, seed, epoch)
        return self._at(window, random.integers(self._counts(window).sum(), size=size))

    def near(self, rows: Rows, seed: int, epoch: int, shares: NDArray[np.float64]) -> Rows:
        """Return for each of `rows` (N,) one read together with it, by numbers in [0, 1) (N,)."""
        found = [
            self._at(window, np.array([share * self._counts(window).sum()]).astype(np.int64))
            for window, share in (
                (self.around(row, seed, epoch), share)
                for row, share in zip(rows.tolist(), shares.tolist(), strict=True)
            )
        ]
        return np.concatenate([np.empty(0, np.int64), *found])

    def _shuffled(self, seed: int, epoch: int) -> Rows:
        return generator(seed, "shards", epoch).permutation(len(self.starts) - 1)

    def _bounds(self) -> Rows:
        """Return where windows begin and end in the order of the shards (W + 1,)."""
        total = len(self.starts) - 1
        windows = max(1, -(-total // self.shards))
        return np.arange(windows + 1) * total // windows

    def _counts(self, window: Rows) -> Rows:
        return self.starts[window + 1] - self.starts[window]

    def _at(self, window: Rows, places: Rows) -> Rows:
        """Turn places among the rows of a window into rows."""
        ends = np.cumsum(self._counts(window))
        which = np.searchsorted(ends, places, side="right")
        before = ends - self._counts(window)
        return self.starts[window][which] + places - before[which]


def windows_of(starts: Rows, shards: int) -> Windows:
    """Return windows of `shards` shards; those without a row count for nothing."""
    return Windows(np.unique(starts), shards)
