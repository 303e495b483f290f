"""Where the files that ship with the package lie: presets, known data sets, weights."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal


def shipped(kind: Literal["cfg", "datasets", "weights"]) -> Path:
    """Return the folder `kind`: inside an installed wheel, else at the top of the checkout."""
    package = Path(str(files("visiontrain")))
    installed = package / "_shipped" / kind
    return installed if installed.is_dir() else package.parent / kind
