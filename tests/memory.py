"""A table of pictures in memory, for tests of what is done with them."""

from dataclasses import dataclass, field

import numpy as np

from visiontrain.core.errors import DataError
from visiontrain.data.table import Table


@dataclass
class MemoryImages:
    """An ImageSource of arrays; the rows in `broken` cannot be read."""

    pictures: list
    broken: set = field(default_factory=set)
    names: list | None = None  # their files', if not numbers

    def __len__(self):
        return len(self.pictures)

    def read(self, row):
        if row in self.broken:
            raise DataError(f"picture {row}: broken; replace it")
        return self.pictures[row]

    def name(self, row):
        return f"picture {row}" if self.names is None else self.names[row]


def memory_table(pictures, rows=None, *, broken=(), classes=4):
    """Return a table of `pictures` (H, W, 3); `rows` has (M, 5) of class and box for each."""
    rows = rows or [np.zeros((0, 5), np.float32)] * len(pictures)
    labels = np.concatenate(rows).astype(np.float32)
    none = np.zeros(len(labels), bool)
    return Table(
        names=tuple(f"class {i}" for i in range(classes)),
        images=MemoryImages(pictures, set(broken)),
        sizes=np.array([p.shape[1::-1] for p in pictures], np.int32),
        offsets=np.cumsum([0, *map(len, rows)]),
        boxes=labels[:, 1:5],
        classes=labels[:, 0].astype(np.int32),
        crowd=none,
        difficult=none,
        area=(labels[:, 3] - labels[:, 1]) * (labels[:, 4] - labels[:, 2]),
    )
