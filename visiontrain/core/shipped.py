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


def presets(folder: Path) -> dict[str, Path]:
    """Return the presets in a folder by name, such as `detect/bccd`; recipes for clusters are none.

    Args:
        folder: such as `shipped("cfg")`.
    """
    found = {path.relative_to(folder).with_suffix(""): path for path in folder.glob("*/*.yaml")}
    return {name.as_posix(): found[name] for name in sorted(found) if name.parts[0] != "cluster"}
