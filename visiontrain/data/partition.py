"""How the images of one data set are dealt out to clients that each keep their own.

N images, C classes, K clients. A client's share of one split says what its share of another is
like: under `dirichlet` and `classes` the same shares of classes, under `source` the same sources.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePath

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import ImageSource
from visiontrain.core.seed import generator
from visiontrain.data.table import Table

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
Pixels = NDArray[np.uint8]
LEAST = 10  # images that a client of a Dirichlet draw has, where there are enough
DRAWS = 1000  # until that is given up


@dataclass(frozen=True, slots=True)
class Dealing:
    """How images are dealt out."""

    kind: str  # a key of PARTITIONS
    clients: int
    alpha: float = 0.5  # of Dirichlet draws: the lower, the more unequal
    classes: int = 2  # that a client has, under `classes`
    seed: int = 0


def deal(dealing: Dealing, train: Table, other: Table) -> tuple[list[Rows], list[Rows]]:
    """Deal the images of two splits out.

    Returns:
        The rows of each client, ascending: of `train`, and of `other`.

    Raises:
        ConfigError: a client would have no image to train on.
    """
    owners = PARTITIONS[dealing.kind](dealing, train, other)
    dealt = [[np.flatnonzero(owner == k) for k in range(dealing.clients)] for owner in owners]
    empty = next((k for k, rows in enumerate(dealt[0]) if not len(rows)), None)
    if empty is not None:
        raise ConfigError(
            f"strategy.clients: {dealing.clients}, of {len(train)} images; client {empty} would "
            f"have none under strategy.partition={dealing.kind}, take fewer or another partition"
        )
    return dealt[0], dealt[1]


def main_class(table: Table) -> Rows:
    """Return the class (N,) that each image has most boxes of, the first of several; C for none."""
    count, classes = len(table), len(table.names)
    owner = np.repeat(np.arange(count, dtype=np.int64), np.diff(table.offsets))
    pairs, boxes = np.unique(owner * classes + table.classes, return_counts=True)
    best = np.lexsort((pairs % classes, -boxes, pairs // classes))  # of each image the first
    images, first = np.unique(pairs[best] // classes, return_index=True)
    found = np.full(count, classes, np.int64)
    found[images] = pairs[best][first] % classes
    return found


def iid(dealing: Dealing, train: Table, other: Table) -> tuple[Rows, Rows]:
    """Shuffle and cut evenly."""
    return _evenly(dealing, train, "train"), _evenly(dealing, other, "other")


def _evenly(dealing: Dealing, table: Table, name: str) -> Rows:
    order = generator(dealing.seed, "partition", name).permutation(len(table))
    owner = np.empty(len(table), np.int64)
    owner[order] = np.arange(len(table)) * dealing.clients // max(1, len(table))
    return owner


def dirichlet(dealing: Dealing, train: Table, other: Table) -> tuple[Rows, Rows]:
    """Give each client a share of every class, drawn from Dir(alpha).

    As Li et al. 2022 (NIID-Bench, arXiv 2102.02079): who has an even share of all images already
    gets nothing of the classes that follow, and draws are repeated until everybody has ten.
    """
    random = generator(dealing.seed, "partition", "shares")
    labels, clients = main_class(train), dealing.clients
    counts = np.bincount(labels, minlength=len(train.names) + 1)
    least = least_of(len(train), clients)
    for _ in range(DRAWS):
        shares = np.zeros((len(counts), clients))
        sizes = np.zeros(clients)
        for label in np.flatnonzero(counts):
            drawn = random.dirichlet(np.full(clients, dealing.alpha))
            drawn = drawn * (sizes < len(train) / clients)
            # All of it may have gone to those who have enough.
            shares[label] = drawn / drawn.sum() if drawn.sum() > 0 else 1 / clients
            sizes += np.diff(np.round(np.append(0, shares[label].cumsum()) * counts[label]))
        if sizes.min() >= least:
            break
    else:
        raise ConfigError(
            f"strategy.alpha: {dealing.alpha:g}; no draw gave each of {clients} clients "
            f"{least} of {len(train)} images, take a larger alpha or fewer clients"
        )
    shares[counts == 0] = 1 / clients  # classes of another split alone
    return _by_shares(dealing, train, shares, "train"), _by_shares(dealing, other, shares, "other")


def least_of(images: int, clients: int) -> int:
    """Return how many images each client has at least: ten, or a fourth of an even share."""
    return min(LEAST, max(1, images // (4 * clients)))


def classes(dealing: Dealing, train: Table, other: Table) -> tuple[Rows, Rows]:
    """Give each client `classes` classes, and an even part of each among those that have it.

    As NIID-Bench's #C=k: client i has class i modulo C, and others at random.
    """
    count, clients, own = len(train.names), dealing.clients, dealing.classes
    if own > count:
        raise ConfigError(f"strategy.classes: {own}; the data has {count}")
    random = generator(dealing.seed, "partition", "classes")
    has = np.zeros((count + 1, clients), bool)
    for client in range(clients):
        first = client % count
        rest = random.permutation(np.delete(np.arange(count), first))
        has[np.append(first, rest[: own - 1]), client] = True
    has[count] = True  # images without labels
    has[~has.any(axis=1)] = True  # a class that nobody drew
    shares = has / has.sum(axis=1, keepdims=True)
    return _by_shares(dealing, train, shares, "train"), _by_shares(dealing, other, shares, "other")


def _by_shares(dealing: Dealing, table: Table, shares: Floats, name: str) -> Rows:
    """Deal out each class by the clients' shares of it (C + 1, K); return the owners (N,)."""
    random = generator(dealing.seed, "partition", "rows", name)
    labels, owner = main_class(table), np.empty(len(table), np.int64)
    for label in range(len(shares)):
        rows = random.permutation(np.flatnonzero(labels == label))
        ends = np.round(shares[label].cumsum() * len(rows))
        owner[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right")
    return owner


def quantity(dealing: Dealing, train: Table, other: Table) -> tuple[Rows, Rows]:
    """Give each client a share of all images, drawn from Dir(alpha); classes are mixed."""
    random = generator(dealing.seed, "partition", "shares")
    least = least_of(len(train), dealing.clients)
    for _ in range(DRAWS):
        shares = random.dirichlet(np.full(dealing.clients, dealing.alpha))
        if (np.diff(np.round(np.append(0, shares.cumsum()) * len(train))) >= least).all():
            break
    else:
        raise ConfigError(
            f"strategy.alpha: {dealing.alpha:g}; no draw gave each of {dealing.clients} clients "
            f"{least} of {len(train)} images, take a larger alpha or fewer clients"
        )

    def owners(table: Table, name: str) -> Rows:
        order = generator(dealing.seed, "partition", "rows", name).permutation(len(table))
        owner = np.empty(len(table), np.int64)
        ends = np.round(shares.cumsum() * len(table))
        owner[order] = np.searchsorted(ends, np.arange(len(table)), side="right")
        return owner

    return owners(train, "train"), owners(other, "other")


def source(dealing: Dealing, train: Table, other: Table) -> tuple[Rows, Rows]:
    """Give each client whole folders of images: a hospital's, a camera's.

    The largest first, each to whoever has the fewest images. Images of folders that `train` does
    not have are dealt out evenly.
    """
    folders = [str(PurePath(train.images.name(row)).parent) for row in range(len(train))]
    names, counts = np.unique(folders, return_counts=True)
    if len(names) < dealing.clients:
        raise ConfigError(
            f"strategy.partition: source, but images lie in {len(names)} folders; "
            f"strategy.clients={dealing.clients} takes as many"
        )
    sizes, owner_of = np.zeros(dealing.clients), dict[str, int]()
    for place in np.lexsort((names, -counts)):
        client = int(sizes.argmin())
        owner_of[str(names[place])] = client
        sizes[client] += counts[place]
    # Splits often lie in folders of their own: what follows the split tells sources apart, unless
    # several are called the same.
    last = Counter(PurePath(name).name for name in owner_of)
    tails = {PurePath(n).name: k for n, k in owner_of.items() if last[PurePath(n).name] == 1}
    others = _evenly(dealing, other, "other")
    for row in range(len(other)):
        folder = PurePath(other.images.name(row)).parent
        others[row] = owner_of.get(str(folder), tails.get(folder.name, others[row]))
    return np.array([owner_of[folder] for folder in folders], np.int64), others


PARTITIONS: Mapping[str, Callable[[Dealing, Table, Table], tuple[Rows, Rows]]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "classes": classes,
    "quantity": quantity,
    "source": source,
    "feature": iid,  # pictures differ: see `Camera`
}


@dataclass(frozen=True, slots=True)
class Chosen:
    """Some rows of other images, in this order."""

    images: ImageSource
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Pixels:
        """Return image `row` as (H, W, 3)."""
        return self.images.read(int(self.rows[row]))

    def name(self, row: int) -> str:
        """Name image `row`."""
        return self.images.name(int(self.rows[row]))


@dataclass(frozen=True, slots=True)
class Camera:
    """Images as one client's camera would show them: its own white balance, gain and blur."""

    images: ImageSource
    gains: tuple[float, float, float]  # of red, green and blue
    blur: float  # standard deviation, as a share of the shorter side

    @classmethod
    def of(cls, images: ImageSource, client: int, seed: int) -> Camera:
        """Make a client's: gains of 0.5 to 1.5, a blur of up to a hundredth."""
        random = generator(seed, "camera", client)
        red, green, blue = random.uniform(0.5, 1.5, 3)
        return cls(images, (float(red), float(green), float(blue)), float(random.uniform(0, 0.01)))

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> Pixels:
        """Return image `row` as (H, W, 3)."""
        image = self.images.read(row)
        curves = np.arange(256)[:, None] * np.array(self.gains)
        levels = curves.round().clip(0, 255).astype(np.uint8)  # (256, 3)
        shown = levels[image, np.arange(3)]
        sigma = self.blur * min(image.shape[:2])
        if sigma > 0.1:
            shown = np.asarray(cv2.GaussianBlur(shown, (0, 0), sigma), np.uint8)
        return shown

    def name(self, row: int) -> str:
        """Name image `row`."""
        return self.images.name(row)


def part(table: Table, rows: Rows, dealing: Dealing, client: int) -> Table:
    """Return a client's part of a split."""
    images: ImageSource = Chosen(table.images, rows)
    if dealing.kind == "feature":
        images = Camera.of(images, client, dealing.seed)
    # Shards of all clients' images: which are read together says nothing of these.
    return replace(table.chosen(rows, images), windows=None)


def no_images(table: Table) -> Table:
    """Return a table like this one without any image."""
    rows = np.empty(0, np.int64)
    return replace(table.chosen(rows, Chosen(table.images, rows)), windows=None)
