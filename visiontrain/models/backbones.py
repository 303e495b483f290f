"""timm's networks as bodies: taken apart into blocks, so that pipelines can cut them.

Each family has a function that lists its blocks in the order they run; that they compute what
timm computes is tested. A network of another family is one block, which nothing can cut.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.models.blocks import make_norm
from visiontrain.models.body import STRIDES, Body, Level, chain
from visiontrain.models.config import Norm
from visiontrain.models.pretrained import installed_weights

Blocks = dict[str, nn.Module]
Taps = dict[int, str]  # stride -> the block whose output is the map


class Normalise(nn.Module):
    """Bring pixels in [0, 1] to the mean and deviation that a network was trained with."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Keep the shape (B, 3, H, W)."""
        return (images - self.mean) / self.std


class ChannelsFirst(nn.Module):
    """Turn maps (B, H, W, C) into (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Permute."""
        return x.permute(0, 3, 1, 2)


class Tokens(nn.Module):
    """A vision transformer's beginning: patches, their places, the extra tokens."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.patch_embed, self.norm_pre = net.patch_embed, net.norm_pre
        self.pos_embed, self.cls_token, self.reg_token = (
            net.pos_embed,
            net.cls_token,
            net.reg_token,
        )
        self.extra, self.bare = net.num_prefix_tokens, net.no_embed_class

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to tokens (B, extra + H / patch * W / patch, C)."""
        from timm.layers import resample_abs_pos_embed  # noqa: PLC0415 - a second

        x = self.patch_embed(images)  # (B, H / patch, W / patch, C)
        places = resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(x.shape[1:3]),
            old_size=list(self.patch_embed.grid_size),
            num_prefix_tokens=0 if self.bare else self.extra,
        )
        x = x.flatten(1, 2)
        first = [
            t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        x = torch.cat([*first, x + places], 1) if self.bare else torch.cat([*first, x], 1) + places
        return self.norm_pre(x)


class Grid(nn.Module):
    """A vision transformer's end: the last norm, and tokens back in their places."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.norm, self.extra = net.norm, net.num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, extra + S * S, C) to (B, C, S, S)."""
        x = self.norm(x)[:, self.extra :]
        side = math.isqrt(x.shape[1])
        return x.transpose(1, 2).unflatten(2, (side, side))


# -- families -----------------------------------------------------------------------


def resnet(net: Any) -> tuple[Blocks, Taps]:
    """Take a ResNet apart into its residual blocks."""
    blocks: Blocks = {"stem": nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)}
    taps: Taps = {}
    for number, stride in enumerate(STRIDES, start=1):
        layers = getattr(net, f"layer{number}")
        blocks |= {f"layer{number}_{i}": layer for i, layer in enumerate(layers)}
        taps[stride] = list(blocks)[-1]
    return blocks, taps


def efficientnet(net: Any) -> tuple[Blocks, Taps]:
    """Take an EfficientNet or a MobileNetV3 apart into its inverted bottlenecks."""
    blocks: Blocks = {"stem": nn.Sequential(net.conv_stem, net.bn1)}
    ends = {
        int(info["module"].split(".")[1]): info["reduction"]
        for info in net.feature_info
        if info["module"].startswith("blocks.")
    }
    taps: Taps = {}
    for number, stage in enumerate(net.blocks):
        blocks |= {f"stage{number}_{i}": block for i, block in enumerate(stage)}
        if ends.get(number) in STRIDES:
            taps[ends[number]] = list(blocks)[-1]
        if len(taps) == len(STRIDES):
            break  # what follows only serves classification
    return blocks, taps


def staged(stem: nn.Module, stages: Any) -> tuple[Blocks, Taps]:
    """Take apart what is a stem and four stages, each of which may begin with a reduction."""
    blocks: Blocks = {"stem": stem}
    taps: Taps = {}
    for number, (stage, stride) in enumerate(zip(stages, STRIDES, strict=True)):
        if not isinstance(stage.downsample, nn.Identity):
            blocks[f"merge{number}"] = stage.downsample  # "down" is the name of paths
        blocks |= {f"stage{number}_{i}": block for i, block in enumerate(stage.blocks)}
        taps[stride] = list(blocks)[-1]
    return blocks, taps


def vision_transformer(net: Any) -> tuple[Blocks, Taps]:
    """Take a plain vision transformer apart into its blocks; all maps have its patches' stride."""
    patch = getattr(net.patch_embed, "patch_size", None)
    if patch != (16, 16) or type(net.patch_embed).__name__ != "PatchEmbed":
        raise ConfigError(
            f"model.backbone: a transformer of patches {patch}; take one of 16 x 16 pixels"
        )
    blocks: Blocks = {"stem": Tokens(net)}
    blocks |= {f"block{i}": block for i, block in enumerate(net.blocks)}
    blocks["grid"] = Grid(net)
    return blocks, {16: "grid"}


def families() -> Mapping[type[nn.Module], Callable[[Any], tuple[Blocks, Taps]]]:
    """Return what takes apart which class of timm's."""
    from timm import models  # noqa: PLC0415 - seconds

    return {
        models.ResNet: resnet,
        models.EfficientNet: efficientnet,
        models.MobileNetV3: efficientnet,
        models.ConvNeXt: lambda net: staged(net.stem, net.stages),
        models.SwinTransformer: lambda net: staged(net.patch_embed, net.layers),
        models.VisionTransformer: vision_transformer,
    }


# -- from a name to a body ------------------------------------------------------------

# Without these, a transformer takes images of one size only, and Swin drops paths at random.
KEYS: Mapping[str, Mapping[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "deit": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False, "drop_path_rate": 0.0},
}


def create(name: str, *, hub: bool = False, num_classes: int = 0, **keys: Any) -> Any:
    """Make timm's network `name`, without a classifier unless it is given classes.

    Raises:
        ConfigError: timm has none of that name, or its weights cannot be downloaded.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when timm imports the hub
    import timm  # noqa: PLC0415 - seconds
    from timm.models import model_entrypoint  # noqa: PLC0415

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        meant = f"did you mean {close[0]}?" if close else "timm.list_models() lists all"
        raise ConfigError(f"model.backbone: timm has no {name!r}; {meant}")
    family = model_entrypoint(name).__module__.rpartition(".")[2]
    keys = {**KEYS.get(family, {}), **keys}
    try:
        return timm.create_model(name, pretrained=hub, num_classes=num_classes, **keys)
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        if not hub:
            raise ConfigError(f"model.backbone: {name}: {first}; take another") from error
        raise ConfigError(
            f"model.pretrained: the weights of {name} cannot be downloaded ({first}); "
            "model.pretrained=none starts from random ones"
        ) from error


def create_pretrained(name: str, *, hub: bool) -> Any:
    """Make timm's network `name`, without a classifier, with its pretrained weights.

    Raises:
        ConfigError: there are none, or they cannot be downloaded.
        CheckpointError: the file is damaged.
    """
    net = create(name, hub=hub)
    if not hub:
        net.load_state_dict(installed_weights(name, net.state_dict()))
    return net


def taken_apart(net: Any, norm: Norm) -> tuple[Blocks, Taps] | None:
    """Take `net`, as `create` made it, apart; None where its family is not known.

    Raises:
        ConfigError: its normalisation cannot become `norm`.
    """
    take_apart = families().get(type(net))
    if take_apart is None:
        return None
    blocks, taps = take_apart(with_norm(net, norm))
    blocks["stem"] = nn.Sequential(normalise(net), blocks["stem"])
    return blocks, taps


def timm_body(net: Any, norm: Norm) -> Body | None:
    """Make a body of `net`; None where its family is not known.

    Raises:
        ConfigError: its normalisation cannot become `norm`.
    """
    parts = taken_apart(net, norm)
    if parts is None:
        return None
    blocks, taps = parts
    inputs = chain(list(blocks))
    if len(taps) == 1:
        return _pyramid(Body(blocks, inputs, {16: Level(taps[16], net.num_features)}), norm)
    channels = {info["reduction"]: info["num_chs"] for info in net.feature_info}
    if type(net).__name__ == "SwinTransformer":  # its maps have channels last
        for stride, name in taps.items():
            blocks[f"level{stride}"], inputs[f"level{stride}"] = ChannelsFirst(), (name,)
        taps = {stride: f"level{stride}" for stride in taps}
    return Body(blocks, inputs, {s: Level(name, channels[s]) for s, name in taps.items()})


def normalise(net: Any) -> Normalise:
    """Return what `net` wants its pixels to go through."""
    return Normalise(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])


def with_norm(net: Any, norm: Norm) -> Any:
    """Change batch normalisation, if there is any, to `norm`.

    Raises:
        ConfigError: to group, which would make pretrained weights worthless.
    """
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # noqa: PLC0415

    kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
    if norm == "batch" or not any(isinstance(module, kinds) for module in net.modules()):
        return net
    if norm == "group":
        raise ConfigError(
            "model.norm: group, but the backbone was made with batch norm; take model.norm=frozen"
        )
    return freeze_batch_norm_2d(net) if norm == "frozen" else convert_sync_batchnorm(net)


def pretrained_tensors(net: Any, norm: Norm) -> dict[str, Tensor]:
    """Return the tensors of `net` under the names that they have in a detector."""
    parts = taken_apart(net, norm)
    return {
        f"blocks.{name}.{key}": value
        for name, block in (parts[0] if parts else {}).items()
        for key, value in block.state_dict().items()
    }


def _pyramid(body: Body, norm: Norm) -> Body:
    """Make maps of all strides from one of stride 16 (ViTDet's, Li et al. 2022, 2203.16527)."""
    (level,) = body.levels.values()
    half, quarter = level.channels // 2, level.channels // 4
    double = nn.ConvTranspose2d(level.channels, half, 2, 2)
    again = nn.Sequential(make_norm(norm, half), nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2))
    added: Blocks = {"finer8": double, "finer4": again, "coarser32": nn.MaxPool2d(2)}
    reads = {"finer8": (level.block,), "finer4": ("finer8",), "coarser32": (level.block,)}
    levels = {
        4: Level("finer4", quarter),
        8: Level("finer8", half),
        16: level,
        32: Level("coarser32", level.channels),
    }
    return Body({**body.blocks, **added}, {**body.inputs, **reads}, levels, frozenset(added))
