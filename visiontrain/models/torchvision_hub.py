"""torchvision's public weights of COCO: fetched once, checked, read as tensors."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.hub import download_url_to_file, get_dir
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    FCOS_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)

from visiontrain.core.errors import CheckpointError, ConfigError
from visiontrain.models.config import TorchvisionConfig
from visiontrain.models.torchvision_detectors import PREFIX, build_foreign

PUBLISHED = {
    "fcos": FCOS_ResNet50_FPN_Weights.COCO_V1,
    "retinanet": RetinaNet_ResNet50_FPN_Weights.COCO_V1,
    "faster_rcnn": FasterRCNN_ResNet50_FPN_Weights.COCO_V1,
}


@dataclass(frozen=True, slots=True)
class Published:
    """Where weights lie, and what their class rows mean."""

    url: str  # its file's name ends in the first eight digits of the sha256
    names: Sequence[str]  # of the class rows, without a background that has its own

    @classmethod
    def of(cls, kind: str) -> Published:
        """Look up what torchvision itself says; COCO's numbers have gaps, so some rows are N/A."""
        weights = PUBLISHED[kind]
        # FCOS and RetinaNet have a row for the background, which is never asked.
        names = list(weights.meta["categories"])
        return cls(weights.url, names[1:] if kind == "faster_rcnn" else names)


def public_weights(config: TorchvisionConfig) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Return COCO's tensors by the names they have in our network, and their class names.

    Raises:
        ConfigError: they cannot be downloaded.
        CheckpointError: the file is damaged.
    """
    published = Published.of(config.kind)
    theirs = _read(config.kind, published.url)
    frozen = config.model_copy(update={"norm": "frozen"})
    model = build_foreign(frozen, len(published.names))
    net: Any = model.get_submodule(PREFIX.removesuffix("."))
    try:
        net.load_state_dict(theirs)  # which knows how older files name their tensors
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{published.url}: does not fit this version of torchvision ({first}); report it"
        ) from error
    own = model.state_dict()
    return {name: own[name] for name in own if name.startswith(PREFIX)}, published.names


def _read(kind: str, url: str) -> dict[str, Tensor]:
    """Read the file at `url` from torch's cache, where it is put first if it is not there."""
    name = url.rpartition("/")[2]
    path = Path(get_dir()) / "checkpoints" / name
    found = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = found.group(1) if found else ""
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, os.fspath(path), prefix, progress=False)
        except (OSError, RuntimeError) as error:  # of the network, the disk, the checksum
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.pretrained: the weights of {kind} cannot be downloaded ({first}); put "
                f"{url} into {path.parent}, or take model.pretrained=none"
            ) from error
    data = path.read_bytes()
    if not hashlib.sha256(data).hexdigest().startswith(prefix):
        raise CheckpointError(f"{path}: its sha256 does not begin with {prefix}; remove the file")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
