"""The anchor-free, DFL-free, dual-head detector: trained one-to-many, used one-to-one.

Layout after YOLO26 and YOLOv10 (arXiv 2606.03748, 2405.14458) as described in their papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.models.blocks import (
    BottomUp,
    Conv,
    Down,
    PoolPyramid,
    TopDown,
    box_branch,
    class_branch,
)
from visiontrain.models.config import Norm
from visiontrain.models.one_to_one import OneToOne

STRIDES = (8, 16, 32)


@dataclass(frozen=True, slots=True)
class Size:
    """Channels at strides 2 to 32, and bottlenecks per block."""

    widths: tuple[int, int, int, int, int]
    depth: int


SIZES = {
    "yolo_n": Size((16, 32, 64, 128, 256), 1),
    "yolo_s": Size((32, 64, 128, 256, 512), 1),
}


class DualHead(nn.Module):
    """Boxes, one-to-many classes, and what makes the classes one-to-one."""

    def __init__(self, widths: tuple[int, int, int], classes: int, *, norm: Norm) -> None:
        super().__init__()
        box, cls = max(16, widths[0] // 2), max(widths[0], min(classes, 100))
        self.box = nn.ModuleList(box_branch(w, box, norm=norm) for w in widths)
        self.o2m = nn.ModuleList(class_branch(w, cls, classes, norm=norm) for w in widths)
        self.o2o = OneToOne(widths)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Return distances (B, A, 4) in strides and logits (B, A, C): one-to-one in use.

        In training the one-to-many logits come second and the one-to-one logits last.
        """
        many = _flat([branch(m) for branch, m in zip(self.o2m, maps, strict=True)])
        distances = _flat([branch(m) for branch, m in zip(self.box, maps, strict=True)])
        one = self.o2o(maps, distances, many, STRIDES)
        return (distances, many, one) if self.training else (distances, one)


def _flat(levels: Sequence[Tensor]) -> Tensor:
    """Put maps (B, channels, H, W) of all levels behind each other: (B, A, channels)."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


class Yolo(VisionModel):
    """Backbone to strides 8, 16, 32; a path up and a path down; the dual head."""

    inputs = {  # noqa: RUF012 - read-only by convention, checked by the contract test
        "stem": (IMAGE,),
        "stage2": ("stem",),
        "stage3": ("stage2",),
        "stage4": ("stage3",),
        "stage5": ("stage4",),
        "up4": ("stage5", "stage4"),
        "up3": ("up4", "stage3"),
        "down4": ("up3", "up4"),
        "down5": ("down4", "stage5"),
        "head": ("up3", "down4", "down5"),
    }

    def __init__(self, size: Size, classes: int, *, norm: Norm) -> None:
        super().__init__()
        w1, w2, w3, w4, w5 = size.widths
        deep = size.depth
        self.blocks = nn.ModuleDict(
            {
                "stem": Conv(3, w1, 3, 2, norm=norm),
                "stage2": Down(w1, w2, deep, norm=norm),
                "stage3": Down(w2, w3, deep, norm=norm),
                "stage4": Down(w3, w4, deep, norm=norm),
                "stage5": nn.Sequential(Down(w4, w5, deep, norm=norm), PoolPyramid(w5, norm=norm)),
                "up4": TopDown(w5, w4, w4, deep, norm=norm),
                "up3": TopDown(w4, w3, w3, deep, norm=norm),
                "down4": BottomUp(w3, w4, w4, deep, norm=norm),
                "down5": BottomUp(w4, w5, w5, deep, norm=norm),
                "head": DualHead((w3, w4, w5), classes, norm=norm),
            }
        )
