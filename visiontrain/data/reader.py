"""Images of a table, read with a memory for those that cannot be."""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import DataError, FetchError
from visiontrain.data.table import Table

Pixels = NDArray[np.uint8]
_warn = logging.getLogger(__name__).warning

# Of the system, which say nothing of a file: a mount that is away, too many open files.
PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ENOTCONN", "ENODEV", "ENXIO", "EREMOTEIO", "ESHUTDOWN"),
        *("EMFILE", "ENFILE", "ENOMEM", "EAGAIN", "EBUSY", "ETIMEDOUT"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET"),
    )
    if hasattr(errno, name)
)
PAUSES = (1.0, 4.0, 15.0)  # seconds between tries
LIMIT = 3  # images in a row that the system does not give: then it is no single file's fault


@dataclass(slots=True)
class Reader:
    """Reads images, remembering which cannot be read."""

    table: Table
    bad: set[int] = field(default_factory=set)
    reason: str = ""  # why the last of these cannot be read
    refused: int = 0  # how many in a row the system did not give
    withheld: set[int] = field(default_factory=set)  # rows that it did not give once

    def read(self, row: int) -> Pixels | None:
        """Return image `row`, or None when it cannot be read; of damage said once per process.

        What the system does not give is asked for again for 20 s, and remembered if it does not
        give it a second time while it gives others: a bad sector looks like a mount that is away.

        Raises:
            FetchError: it did not give LIMIT images in a row.
        """
        if row in self.bad:
            return None
        reason = ""
        for pause in (*PAUSES, None):
            try:
                image = self.table.images.read(row)
            except DataError as error:
                self.reason = reason = str(error)
                if not _passing(error):
                    self.bad.add(row)
                    break
                if pause is not None:
                    time.sleep(pause)
            else:
                self.refused = 0
                return image
        else:
            if row in self.withheld and not self.refused:
                self.bad.add(row)
            self.withheld.add(row)
            self.refused += 1
        _warn("%s", reason)
        if self.refused >= LIMIT:
            raise FetchError(
                f"{reason}; so are {LIMIT} images in a row after {sum(PAUSES):.0f} s each; "
                "when the disk or the network is there again, go on with resume=true"
            )
        return None

    def readable(self, row: int) -> tuple[int, Pixels]:
        """Return the first row at or after `row`, around the end, that can be read, and it.

        Raises:
            DataError: when none can.
            FetchError: as for `read`.
        """
        for k in range(len(self.table)):
            candidate = (row + k) % len(self.table)
            image = self.read(candidate)
            if image is not None:
                return candidate, image
        raise DataError(f"data: no image can be read; of the last: {self.reason}")


def _passing(error: DataError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in PASSING
