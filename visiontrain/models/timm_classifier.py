"""timm's networks as classifiers, taken apart into blocks where their family is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from visiontrain.models.backbones import Blocks, Tokens, create, normalise, staged, with_norm
from visiontrain.models.classifier import Classifier
from visiontrain.models.config import Timm

WHOLE = "all"  # the one block of a network that is not taken apart


def resnet(net: Any) -> Blocks:
    """Take a ResNet apart."""
    blocks: Blocks = {"stem": nn.Sequential(net.conv1, net.bn1, net.act1, net.maxpool)}
    for number in range(1, 5):
        layers = getattr(net, f"layer{number}")
        blocks |= {f"layer{number}_{i}": layer for i, layer in enumerate(layers)}
    return blocks | {"head": nn.Sequential(net.global_pool, net.fc)}


def efficientnet(net: Any) -> Blocks:
    """Take an EfficientNet apart."""
    return _inverted(net) | {
        "head": nn.Sequential(net.conv_head, net.bn2, net.global_pool, net.classifier)
    }


def mobilenet(net: Any) -> Blocks:
    """Take a MobileNetV3 apart."""
    tail = (net.global_pool, net.conv_head, net.norm_head, net.act2, net.flatten, net.classifier)
    return _inverted(net) | {"head": nn.Sequential(*tail)}


def _inverted(net: Any) -> Blocks:
    blocks: Blocks = {"stem": nn.Sequential(net.conv_stem, net.bn1)}
    for number, stage in enumerate(net.blocks):
        blocks |= {f"stage{number}_{i}": block for i, block in enumerate(stage)}
    return blocks


def convnext(net: Any) -> Blocks:
    """Take a ConvNeXt apart."""
    return staged(net.stem, net.stages)[0] | {"head": nn.Sequential(net.norm_pre, net.head)}


def swin(net: Any) -> Blocks:
    """Take a Swin transformer apart."""
    return staged(net.patch_embed, net.layers)[0] | {"head": nn.Sequential(net.norm, net.head)}


class TokenHead(nn.Module):
    """A vision transformer's end: norm, one token or the mean of all, decision."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.norm, self.fc_norm, self.head = net.norm, net.fc_norm, net.head
        self.attn_pool = net.attn_pool
        self.pool, self.extra = net.global_pool, net.num_prefix_tokens
        self.with_extra = getattr(net, "pool_include_prefix", None)  # older timm: None

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, extra + N, C) to logits (B, classes)."""
        from timm.layers import global_pool_nlc  # noqa: PLC0415 - a second

        x = self.norm(x)
        if self.attn_pool is not None:
            x = self.attn_pool(x[:, self.extra :] if self.with_extra is False else x)
        else:
            x = global_pool_nlc(
                x, self.pool, self.extra, reduce_include_prefix=bool(self.with_extra)
            )
        return self.head(self.fc_norm(x))


def vision_transformer(net: Any) -> Blocks:
    """Take a plain vision transformer apart."""
    blocks: Blocks = {"stem": Tokens(net)}
    blocks |= {f"block{i}": block for i, block in enumerate(net.blocks)}
    return blocks | {"head": TokenHead(net)}


def families() -> Mapping[type[nn.Module], Callable[[Any], Blocks]]:
    """Return what takes apart which class of timm's."""
    from timm import models  # noqa: PLC0415 - seconds

    return {
        models.ResNet: resnet,
        models.EfficientNet: efficientnet,
        models.MobileNetV3: mobilenet,
        models.ConvNeXt: convnext,
        models.SwinTransformer: swin,
        models.VisionTransformer: vision_transformer,
    }


class Entire(nn.Module):
    """A network that is not taken apart, on pixels in [0, 1]."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.pixels, self.net = normalise(net), net

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        return self.net(self.pixels(images))


def _body(net: Any) -> tuple[str, ...]:
    """Name what comes before the classifier in a network that is not taken apart."""
    last = net.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((last,) if isinstance(last, str) else last))
    return tuple(f"blocks.{WHOLE}.net.{n}" for n in net.state_dict() if not n.startswith(heads))


def timm_classifier(config: Timm, classes: int) -> Classifier:
    """Make a classifier of the network that `config` names.

    Raises:
        ConfigError: timm has none of that name.
    """
    return assembled(create(config.backbone, num_classes=classes), config)


def assembled(net: Any, config: Timm) -> Classifier:
    """Take a network of timm's apart, and put a classifier together."""
    net = with_norm(net, config.norm)
    take_apart = families().get(type(net))
    patches = type(getattr(net, "patch_embed", None)).__name__
    if take_apart is None or (take_apart is vision_transformer and patches != "PatchEmbed"):
        return Classifier({WHOLE: Entire(net)}, _body(net))
    blocks = take_apart(net)
    blocks["stem"] = nn.Sequential(normalise(net), blocks["stem"])
    return Classifier(blocks, tuple(f"blocks.{name}." for name in blocks if name != "head"))
