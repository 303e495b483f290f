"""Building blocks of the detectors: convolution, cross-stage stages, pooling, heads."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontrain.models.config import Norm

GROUP_CHANNELS = 8  # channels per group of norm=group, more where that does not divide


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Return the normalisation layer `kind` for `channels`."""
    if kind == "group":
        most = max(1, channels // GROUP_CHANNELS)
        groups = next(n for n in range(most, 0, -1) if channels % n == 0)
        return nn.GroupNorm(groups, channels)
    if kind == "frozen":
        from torchvision.ops import FrozenBatchNorm2d  # noqa: PLC0415 - a second, rarely used

        return FrozenBatchNorm2d(channels, eps=1e-3)
    if kind == "sync":
        return nn.SyncBatchNorm(channels, eps=1e-3, momentum=0.1)
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)


class Conv(nn.Module):
    """Convolution, normalisation, SiLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        norm: Norm,
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.norm = make_norm(norm, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        return F.silu(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """Two 3x3 convolutions with a residual."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.reduce = Conv(channels, channels // 2, 3, norm=norm)
        self.expand = Conv(channels // 2, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        return x + self.expand(self.reduce(x))


class CrossStage(nn.Module):
    """Cross-stage partial block: half of the channels pass bottlenecks, all are fused.

    After CSPNet (Wang et al. 2020), every bottleneck's output joining the fusion as in ELAN.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, *, norm: Norm) -> None:
        super().__init__()
        half = outputs // 2
        self.split = Conv(inputs, 2 * half, 1, norm=norm)
        self.bottlenecks = nn.ModuleList(Bottleneck(half, norm=norm) for _ in range(depth))
        self.fuse = Conv((2 + depth) * half, outputs, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, H, W) to (B, outputs, H, W)."""
        parts = list(self.split(x).chunk(2, 1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return self.fuse(torch.cat(parts, 1))


class PoolPyramid(nn.Module):
    """Three 5x5 max-pools in series, all fused: receptive fields of 5, 9 and 13 (SPPF)."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.reduce = Conv(channels, channels // 2, 1, norm=norm)
        self.fuse = Conv(channels * 2, channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Keep the shape."""
        parts = [self.reduce(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.fuse(torch.cat(parts, 1))


class Down(nn.Sequential):
    """Halve the resolution, then a cross-stage block."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, norm: Norm) -> None:
        super().__init__(
            Conv(inputs, outputs, 3, 2, norm=norm), CrossStage(outputs, outputs, depth, norm=norm)
        )


class TopDown(nn.Module):
    """Bring a coarse map up to a finer one and fuse both."""

    def __init__(self, coarse: int, fine: int, outputs: int, depth: int, *, norm: Norm) -> None:
        super().__init__()
        self.fuse = CrossStage(coarse + fine, outputs, depth, norm=norm)

    def forward(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return a map of the size of `fine`."""
        up = F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
        return self.fuse(torch.cat([up, fine], 1))


class BottomUp(nn.Module):
    """Bring a fine map down to a coarser one and fuse both."""

    def __init__(self, fine: int, coarse: int, outputs: int, depth: int, *, norm: Norm) -> None:
        super().__init__()
        self.down = Conv(fine, fine, 3, 2, norm=norm)
        self.fuse = CrossStage(fine + coarse, outputs, depth, norm=norm)

    def forward(self, fine: Tensor, coarse: Tensor) -> Tensor:
        """Return a map of the size of `coarse`."""
        return self.fuse(torch.cat([self.down(fine), coarse], 1))


def box_branch(inputs: int, width: int, *, norm: Norm) -> nn.Sequential:
    """Return what predicts how far the four sides of a box are, in strides, at one level."""
    last = nn.Conv2d(width, 4, 1)
    nn.init.constant_(_bias(last), 2.0)  # boxes start about four strides wide
    body = Conv(inputs, width, 3, norm=norm), Conv(width, width, 3, norm=norm)
    return nn.Sequential(*body, last, nn.Softplus())


def class_branch(inputs: int, width: int, classes: int, *, norm: Norm) -> nn.Sequential:
    """Return what predicts class logits at one level, starting at probability 0.01 each.

    The start is RetinaNet's prior (Lin et al. 2017): background does not drown the first steps.
    """
    last = nn.Conv2d(width, classes, 1)
    nn.init.constant_(_bias(last), math.log(0.01 / 0.99))
    return nn.Sequential(
        Conv(inputs, inputs, 3, norm=norm, groups=inputs),
        Conv(inputs, width, 1, norm=norm),
        Conv(width, width, 3, norm=norm, groups=width),
        Conv(width, width, 1, norm=norm),
        last,
    )


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
