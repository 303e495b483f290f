"""The order in which shards are read: shards at random, then rows at random in a few of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Rows that lie in S shards, read some shards at a time; pure functions of (seed, epoch).

    Disks and caches of remote files serve a few shards well at once, and all of them badly.
    """

    starts: Rows  # (S + 1,), ascending: the rows of shard s are starts[s] : starts[s + 1]
    shards: int  # read at a time; windows are made even, so it may be one less

    def numbers(self, rows: Rows, seed: int, epoch: int) -> Rows:
        """Return the window (N,) in which each of `rows` (N,) is read in `epoch`."""
        return self._numbers(rows, self._shuffled(seed, epoch))

    def around(self, row: int, seed: int, epoch: int) -> Rows:
        """Return the shards (K,) that are read together with `row` in `epoch`."""
        order, bounds = self._shuffled(seed, epoch), self._bounds()
        window = int(self._numbers(np.array([row]), order)[0])
        return order[bounds[window] : bounds[window + 1]]

    def near(
        self, rows: Rows, at: tuple[int, int], shares: Floats, ends: Floats | None = None
    ) -> Rows:
        """Return for each of `rows` (N,) one that is read together with it.

        Args:
            rows: (N,).
            at: seed, epoch.
            shares: numbers in [0, 1) (N,) that choose.
            ends: how often each row of the table is wanted, added up; default: all alike.
        """
        order, bounds = self._shuffled(*at), self._bounds()
        windows = self._numbers(rows, order).tolist()
        found = [
            self._chosen(order[bounds[window] : bounds[window + 1]], share, ends)
            for window, share in zip(windows, shares.tolist(), strict=True)
        ]
        return np.array(found, np.int64)

    def _chosen(self, window: Rows, share: float, ends: Floats | None) -> int:
        """Return the row at `share` of what the shards of a window weigh."""
        first, last = self.starts[window], self.starts[window + 1]
        before, after = (
            (first, last) if ends is None else (_reached(ends, first), _reached(ends, last))
        )
        total = np.cumsum(after - before)
        place = share * total[-1]
        which = min(int(np.searchsorted(total, place, side="right")), len(window) - 1)
        place += before[which] - (total[which] - (after - before)[which])
        row = int(place) if ends is None else int(np.searchsorted(ends, place, side="right"))
        return min(max(row, int(first[which])), int(last[which]) - 1)

    def _numbers(self, rows: Rows, order: Rows) -> Rows:
        """Return the window of each of `rows` when shards are read in `order`."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        place = np.argsort(order)[shards]
        return np.searchsorted(self._bounds(), place, side="right") - 1

    def _shuffled(self, seed: int, epoch: int) -> Rows:
        return generator(seed, "shards", epoch).permutation(len(self.starts) - 1)

    def _bounds(self) -> Rows:
        """Return where windows begin and end in the order of the shards (W + 1,)."""
        total = len(self.starts) - 1
        windows = max(1, -(-total // self.shards))
        return np.arange(windows + 1) * total // windows


def _reached(ends: Floats, rows: Rows) -> Floats:
    """Return what all rows before each of `rows` weigh together."""
    return np.where(rows > 0, ends[rows - 1], 0.0)


def windows_of(starts: Rows, shards: int) -> Windows:
    """Return windows of `shards` shards; those without a row count for nothing."""
    return Windows(np.unique(starts), shards)
