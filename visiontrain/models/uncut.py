"""Backbones of families that `backbones` cannot take apart: one block, which nothing can cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.models.backbones import Normalise, create, normalise, with_norm
from visiontrain.models.body import STRIDES, Body, Level
from visiontrain.models.config import Norm
from visiontrain.models.yolo import Yolo

PREFIX = "blocks.all.features."  # of the backbone's tensors


class Whole(nn.Module):
    """A backbone and the detector on top of it."""

    def __init__(self, features: Any, pixels: Normalise, top: Yolo) -> None:
        super().__init__()
        self.features, self.pixels, self.top = features, pixels, top

    def forward(self, images: Tensor) -> Any:
        """Return what the detector's head returns."""
        maps = zip(STRIDES, self.features(self.pixels(images)), strict=True)
        values: dict[str, Any] = {f"level{stride}": value for stride, value in maps}
        names = list(self.top.blocks)
        (result,) = self.top.run(names, values, keep=names[-1:])
        return result


class Uncut(VisionModel):
    """A detector of one block: it trains like any other, but no pipeline can cut it."""

    inputs = {"all": (IMAGE,)}  # noqa: RUF012 - read-only by convention

    def __init__(self, whole: Whole) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({"all": whole})
        self.body = (PREFIX,)


def features_of(name: str, *, hub: bool = False) -> Any:
    """Make timm's network `name` as a module that returns maps of strides 4 to 32.

    Raises:
        ConfigError: it has no such maps.
    """
    try:
        net = create(name, hub=hub, features_only=True)
        found = tuple(net.feature_info.reduction())
        indices = [found.index(stride) for stride in STRIDES]
        return create(name, hub=hub, features_only=True, out_indices=indices)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.backbone: {name} gives no maps of strides 4 to 32; take another, as resnet50"
        ) from error


def uncut(features: Any, norm: Norm, **join: Any) -> Uncut:
    """Put a detector on top of `features`; `join` is what `Yolo` takes beside a body."""
    levels = zip(STRIDES, features.feature_info.channels(), strict=True)
    body = Body({}, {}, {s: Level(f"level{s}", channels) for s, channels in levels})
    pixels = normalise(features)
    return Uncut(Whole(with_norm(features, norm), pixels, Yolo(body, norm=norm, **join)))
