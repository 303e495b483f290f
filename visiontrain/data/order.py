"""Which images an epoch visits, how often and in which order: pure functions of (seed, epoch).

N images; K labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator
from visiontrain.data.config import DataConfig
from visiontrain.data.table import Table
from visiontrain.data.windows import Windows

Entries = NDArray[np.int64]  # row + k * N for the k-th repetition of a row in its epoch
Floats = NDArray[np.float64]
When = tuple[int, int]  # seed, epoch
STEPS = 2**16  # offsets that may be drawn: between them, so that no rounding of a sum matters


class Order(Protocol):
    """Decides what an epoch is made of."""

    def __call__(self, images: int, seed: int, epoch: int) -> Entries:
        """Return exactly `images` entries, in the order they are visited, all of them different.

        An entry is `row + k * images`: the row is `entry % images`, and the whole entry keys what
        is random about the sample, so that no repetition of a row looks like another.
        """
        ...

    def chosen(self, draws: Floats, entries: Entries, images: int, at: When) -> Entries:
        """Return the rows (K,) that draws in [0, 1) (K,) choose as partners of `entries` (K,)."""
        ...

    def draw(
        self, random: np.random.Generator, count: int, entry: int, images: int, at: When
    ) -> Entries:
        """Draw the rows of `count` partners of `entry`."""
        ...


@dataclass(frozen=True, slots=True)
class Shuffled:
    """Every image once."""

    def __call__(self, images: int, seed: int, epoch: int) -> Entries:
        """Return the rows, shuffled."""
        return generator(seed, "order", epoch).permutation(images)

    def chosen(self, draws: Floats, entries: Entries, images: int, at: When) -> Entries:
        """Choose every row as often."""
        del entries, at
        return (draws * images).astype(np.int64)

    def draw(
        self, random: np.random.Generator, count: int, entry: int, images: int, at: When
    ) -> Entries:
        """Draw every row as often."""
        del entry, at
        return random.integers(images, size=count)


SHUFFLED = Shuffled()


@dataclass(frozen=True, slots=True, eq=False)
class Balanced:
    """Every image as often as its classes are wanted, in an epoch that is as long as ever."""

    expected: Floats  # (N,): how often each is in an epoch, on average; N in sum
    ends: Floats  # (N,): the same, added up
    group: Entries  # (N,): what is counted out together: the rarest class of each

    def __call__(self, images: int, seed: int, epoch: int) -> Entries:
        """Draw how often each row comes, by systematic resampling, and shuffle.

        The expectations lie end to end on a line, on which points one apart, from a random
        offset on, are counted: each row gets the whole number below or above its expectation, and
        so does each class of single labels, whose rows lie together. Rows of a class lie in
        another order in each epoch, else the same would always go together.
        """
        random = generator(seed, "balance", epoch)
        rows = random.permutation(images)
        rows = rows[np.argsort(self.group[rows], kind="stable")]
        offset = (random.integers(STEPS) + 0.5) / STEPS
        ends = np.floor(np.cumsum(self.expected[rows]) + offset).astype(np.int64)
        ends[-1] = images  # whatever the sum was rounded to
        counts = np.diff(ends, prepend=0)
        again = np.arange(images) - np.repeat(ends - counts, counts)  # 0, 1, ... of each row
        entries = np.repeat(rows, counts) + again * images
        return entries[generator(seed, "order", epoch).permutation(images)]

    def chosen(self, draws: Floats, entries: Entries, images: int, at: When) -> Entries:
        """Choose rows as often as epochs hold them: else mosaics would undo the balance."""
        del entries, at
        places = np.searchsorted(self.ends, draws * self.ends[-1], side="right")
        return places.clip(0, images - 1)

    def draw(
        self, random: np.random.Generator, count: int, entry: int, images: int, at: When
    ) -> Entries:
        """Draw rows as often as epochs hold them."""
        return self.chosen(random.random(count), np.full(count, entry), images, at)


@dataclass(frozen=True, slots=True, eq=False)
class Windowed:
    """Another order, window by window: of shards, a few are read at a time."""

    inner: Order
    windows: Windows

    def __call__(self, images: int, seed: int, epoch: int) -> Entries:
        """Return the entries of the other order, those of a window together."""
        entries = self.inner(images, seed, epoch)
        numbers = self.windows.numbers(entries % images, seed, epoch)
        return entries[np.argsort(numbers, kind="stable")]

    def chosen(self, draws: Floats, entries: Entries, images: int, at: When) -> Entries:
        """Choose rows that are read together with `entries`, as often as the other order does."""
        ends = self.inner.ends if isinstance(self.inner, Balanced) else None
        return self.windows.near(entries % images, at, draws, ends)

    def draw(
        self, random: np.random.Generator, count: int, entry: int, images: int, at: When
    ) -> Entries:
        """Draw rows that are read together with `entry`, as often as the other order does."""
        return self.chosen(random.random(count), np.full(count, entry), images, at)


def order_of(config: DataConfig, table: Table) -> Order:
    """Return the order in which a run goes through `table`."""
    order = _balanced(config, table)
    return order if table.windows is None else Windowed(order, table.windows)


def _balanced(config: DataConfig, table: Table) -> Order:
    if config.balance == "none":
        return SHUFFLED
    owner, label = image_classes(table)
    frequency = np.bincount(label, minlength=len(table.names))  # images that have a class
    if config.balance == "class":
        weights = class_weights(owner, label, frequency, len(table))
    else:
        asked = config.balance_threshold
        threshold = 1 / max(1, np.count_nonzero(frequency)) if asked == "auto" else asked
        weights = repeat_factors(owner, label, frequency / len(table), (threshold, len(table)))
    # Not numpy's sum, which adds in another order on other machines.
    expected = weights * (len(table) / math.fsum(weights.tolist()))
    rarity = np.full(len(table), len(table) + 1)
    np.minimum.at(rarity, owner, frequency[label])
    own = np.full(len(table), len(table.names))
    rarest = rarity[owner] == frequency[label]
    own[owner[rarest]] = label[rarest]
    return Balanced(expected, np.cumsum(expected), own)


def image_classes(table: Table) -> tuple[Entries, Entries]:
    """Return which image has which class, each pair once: rows (P,), classes (P,).

    Crowds and difficult boxes are left out: they are never trained on.
    """
    keep = ~(table.crowd | table.difficult)
    owner = np.repeat(np.arange(len(table)), np.diff(table.offsets))[keep]
    pairs = np.unique(owner * len(table.names) + table.classes[keep])
    return pairs // len(table.names), pairs % len(table.names)


def class_weights(owner: Entries, label: Entries, frequency: Entries, images: int) -> Floats:
    """Weigh images as if a class were drawn, each as often, and then one of its images.

    Class-aware sampling (Shen, Lin and Huang 2016, arXiv 1512.05830). Images without labels keep
    the share of the epoch that they have: how many of them are good is another question.
    """
    weights = np.bincount(owner, 1 / frequency[label], images)
    labelled = np.bincount(owner, minlength=images) > 0
    classes = np.count_nonzero(frequency)
    return np.where(labelled, weights * (labelled.sum() / max(1, classes)), 1.0)


def repeat_factors(
    owner: Entries, label: Entries, share: Floats, rule: tuple[float, int]
) -> Floats:
    """Return the repeat factor of each image: that of its rarest class, 1 at least.

    Gupta, Dollar and Girshick 2019 (arXiv 1908.03195): sqrt(threshold / share of images).

    Args:
        owner: rows of images.
        label: classes that they have.
        share: of the images, by class.
        rule: threshold, number of images.
    """
    threshold, images = rule
    factors = np.ones(images)
    np.maximum.at(factors, owner, np.sqrt(threshold / share[label]))
    return factors


def clause(config: DataConfig, order: Order) -> str:
    """Say for the heading of a run what balancing does to it; nothing where there is none."""
    order = order.inner if isinstance(order, Windowed) else order
    if not isinstance(order, Balanced):
        return ""
    least, most = float(order.expected.min()), float(order.expected.max())
    if most - least < 1e-9:
        return f", balance={config.balance} changes nothing: no class is rarer"
    return f", balance={config.balance}: an image comes {least:.2g} to {most:.2g} times an epoch"
