"""The anchor-free, DFL-free, dual-head detector: trained one-to-many, used one-to-one.

Layout after YOLO26 and YOLOv10 (arXiv 2606.03748, 2405.14458) as described in their papers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.models.blocks import (
    BottomUp,
    Conv,
    Correction,
    Down,
    PoolPyramid,
    TopDown,
    box_branch,
    class_branch,
    start_at,
)
from visiontrain.models.config import Norm

STRIDES = (8, 16, 32)
RIVALS = 4  # two neighbourhoods and two other levels


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
    """Boxes and one-to-many classes, and a correction that makes the classes one-to-one.

    The correction sees detached maps and one-to-many logits, and is added to the latter. It
    starts from all that they know, standing back where a rival scores better, and learns how
    far to: duplicates go without suppression afterwards.
    """

    def __init__(self, widths: tuple[int, int, int], classes: int, *, norm: Norm) -> None:
        super().__init__()
        box, cls = max(16, widths[0] // 2), max(widths[0], min(classes, 100))
        self.box = nn.ModuleList(box_branch(w, box, norm=norm) for w in widths)
        self.o2m = nn.ModuleList(
            class_branch(w, cls, start_at(0.01, cls, classes), norm=norm) for w in widths
        )
        self.o2o = nn.ModuleList(Correction(w, RIVALS, cls, classes, norm=norm) for w in widths)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Return distances (B, A, 4) in strides and logits (B, A, C): one-to-one in use.

        In training the one-to-many logits come second and the one-to-one logits last.
        """
        scores = [branch(m) for branch, m in zip(self.o2m, maps, strict=True)]
        fixes = [
            self.o2o[i](m, score, _margins(scores, i))
            for i, (m, score) in enumerate(zip(maps, scores, strict=True))
        ]
        distances = _flat([branch(m) for branch, m in zip(self.box, maps, strict=True)])
        many = _flat(scores)
        one = many.detach() + _flat(fixes)
        return (distances, many, one) if self.training else (distances, one)


def _margins(scores: Sequence[Tensor], level: int) -> Tensor:
    """Return by how much each anchor's best class logit falls short of its rivals', (B, 4, H, W).

    Rivals are the 3x3 and 5x5 neighbours and the other levels, where the same object shows
    too: without seeing them no anchor can know to stand back. 0 where none is better.
    """
    peaks = [score.detach().amax(1, keepdim=True) for score in scores]
    own, size = peaks[level], peaks[level].shape[-2:]
    near = [F.max_pool2d(own, kernel, 1, kernel // 2) for kernel in (3, 5)]
    far = [
        F.adaptive_max_pool2d(peak, size)
        if peak.shape[-1] > size[-1]
        else F.interpolate(peak, size)
        for peak in (*peaks[:level], *peaks[level + 1 :])
    ]
    return torch.cat([(own - rival).clamp(max=0) for rival in (*near, *far)], 1)


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
