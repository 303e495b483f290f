"""Classifiers: blocks in a row, the last of which pools and decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontrain.core.interfaces import VisionModel
from visiontrain.models.blocks import Conv, make_norm
from visiontrain.models.body import Size, chain, own_body
from visiontrain.models.config import Norm

APART = 0.1  # of a random layer's weights
WIDE = 1280  # channels before pooling, as in MobileNetV2 (Sandler et al. 2018)


class Classifier(VisionModel):
    """Blocks that each read the one before."""

    def __init__(self, blocks: Mapping[str, nn.Module], body: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(blocks)
        self.inputs = chain(list(blocks))
        self.body = body


class PooledHead(nn.Module):
    """Widen, take the mean over all places, decide."""

    def __init__(self, channels: int, classes: int, *, norm: Norm) -> None:
        super().__init__()
        self.widen = Conv(channels, WIDE, 1, norm=norm)
        self.decide = nn.Linear(WIDE, classes)
        nn.init.zeros_(self.decide.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to logits (B, classes)."""
        return self.decide(self.widen(x).mean((2, 3)))


def yolo_classifier(size: Size, classes: int, norm: Norm) -> Classifier:
    """Put a head for classification on the detectors' own stages."""
    body = own_body(size, norm)
    blocks = {**body.blocks, "head": PooledHead(size.widths[-1], classes, norm=norm)}
    return Classifier(blocks, tuple(f"blocks.{name}." for name in body.blocks))


# -- pictures of 32 pixels --------------------------------------------------------------

# Natural pictures of RGB in [0, 1] in patches of 2 x 2: what is left when scaled by these has
# about equal variance in all 12 directions. The directions are brightness and two colours by
# a mean and three differences; the deviations are rounded from CIFAR-10's training pictures.
COLOURS = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
PLACES = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))
DEVIATIONS = (
    (0.80, 0.15, 0.15, 0.06),  # of brightness
    (0.22, 0.02, 0.02, 0.01),  # of red against blue: JPEG leaves little of fine colours
    (0.10, 0.01, 0.01, 0.01),  # of green against both
)


class Whiten(nn.Module):
    """A fixed first layer: patches of 2 x 2 pixels, decorrelated, each direction in both signs.

    After Page 2019 and Jordan 2024 (arXiv 2404.00498), who take the directions from the training
    pictures; those of natural pictures are known, so that nothing hangs on the data here.
    """

    def __init__(self) -> None:
        super().__init__()
        rows = []
        for colour, deviations in zip(COLOURS, DEVIATIONS, strict=True):
            for place, deviation in zip(PLACES, deviations, strict=True):
                row = torch.tensor(colour, dtype=torch.float32)[:, None] * torch.tensor(
                    place, dtype=torch.float32
                )
                rows.append(row.view(3, 2, 2) / row.norm() / deviation)
        weight = torch.stack(rows)
        self.register_buffer("weight", torch.cat([weight, -weight]), persistent=False)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.47), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, S, S) to (B, 24, S - 1, S - 1)."""
        return F.conv2d(images - self.mean, self.weight)


class TinyStage(nn.Module):
    """Halve the resolution, then residual convolutions."""

    def __init__(self, inputs: int, outputs: int, *, depth: int, norm: Norm) -> None:
        super().__init__()
        self.enter = _identity_first(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        self.enter_norm = make_norm(norm, outputs)
        self.stay = _identity_first(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False))
        self.stay_norm = make_norm(norm, outputs)
        self.deeper = nn.Sequential(*(TinyResidual(outputs, norm=norm) for _ in range(depth - 2)))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, S, S) to (B, outputs, S / 2, S / 2)."""
        x = F.gelu(self.enter_norm(F.max_pool2d(self.enter(x), 2)))
        return self.deeper(x + F.gelu(self.stay_norm(self.stay(x))))


class TinyResidual(nn.Module):
    """Add a convolution's outputs to its inputs."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.conv = _identity_first(nn.Conv2d(channels, channels, 3, padding=1, bias=False))
        self.norm = make_norm(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, S, S) to the same shape."""
        return x + F.gelu(self.norm(self.conv(x)))


def _identity_first(layer: nn.Conv2d) -> nn.Conv2d:
    """Let a layer begin by passing its inputs on; what it has beyond them begins at random.

    Copies of neighbours that are alike would tie under pooling, where rounding decides which
    gets the gradient; so they begin a little apart.
    """
    copies = layer.weight.data[: layer.in_channels]
    copies.mul_(APART).add_(nn.init.dirac_(torch.empty_like(copies)))
    return layer


class TinyHead(nn.Module):
    """Take the highest of all places, decide."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.decide = nn.Linear(channels, classes, bias=False)
        self.scale = 1 / 9  # logits begin small, whatever the width

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W) to logits (B, classes)."""
        return self.decide(x.amax((2, 3))) * self.scale


def resnet_tiny(widths: Sequence[int], depth: int, classes: int, norm: Norm) -> Classifier:
    """Make a small residual net for pictures of about 32 pixels: `depth` convolutions a stage."""
    stages = {
        f"stage{k}": TinyStage(a, b, depth=depth, norm=norm)
        for k, (a, b) in enumerate(zip((24, *widths), widths, strict=False), start=1)
    }
    stem = nn.Sequential(Whiten(), nn.GELU())
    return Classifier(
        {"stem": stem, **stages, "head": TinyHead(widths[-1], classes)},
        tuple(f"blocks.{name}." for name in stages),
    )
