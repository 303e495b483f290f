"""Images of a table, read with a memory for those that cannot be."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError
from visiontrain.data.table import Table

Pixels = NDArray[np.uint8]
_warn = logging.getLogger(__name__).warning


@dataclass(slots=True)
class Reader:
    """Reads images, remembering which cannot be read."""

    table: Table
    bad: set[int] = field(default_factory=set)
    reason: str = ""  # why the last of these cannot be read

    def read(self, row: int) -> Pixels | None:
        """Return image `row`, or None when it cannot be read; said once per process."""
        if row in self.bad:
            return None
        try:
            return self.table.images.read(row)
        except DataError as error:
            self.bad.add(row)
            self.reason = str(error)
            _warn("%s", error)
            return None

    def readable(self, row: int) -> tuple[int, Pixels]:
        """Return the first row at or after `row`, around the end, that can be read, and it.

        Raises:
            DataError: when none can.
        """
        for k in range(len(self.table)):
            candidate = (row + k) % len(self.table)
            image = self.read(candidate)
            if image is not None:
                return candidate, image
        raise DataError(f"data: no image can be read; of the last: {self.reason}")
