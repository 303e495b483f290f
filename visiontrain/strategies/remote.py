"""What processes are told that a mode starts itself, on this machine or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visiontrain.core.own import Objects


@dataclass(slots=True)
class Remote:
    """Filled in as the process that the user started finds these things out."""

    run_json: str  # the settled run
    module: str  # that has their entries
    scratch: Path | None  # a folder of this run's, for files that do not outlast it
    objects: Objects  # of the user's
    device: str = "cpu"  # what workers compute on
    traced: bool = False  # whether they tell what they saw
    names: Sequence[str] = ()  # the classes
    images: int = 0  # in an epoch
    digest: str = ""  # of the images and labels
    parts: Sequence[Sequence[str]] = ()  # parameters and float buffers that each server holds

    def tell(self, names: Sequence[str], images: int, digest: str) -> None:
        """Note what the data are."""
        self.names, self.images, self.digest = names, images, digest
