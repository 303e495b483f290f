"""The anchor-free, DFL-free, dual-head detector: trained one-to-many, used one-to-one.

Layout after YOLO26 and YOLOv10 (arXiv 2606.03748, 2405.14458) as described in their papers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visiontrain.core.interfaces import VisionModel
from visiontrain.models.agree import agree
from visiontrain.models.blocks import (
    BottomUp,
    Conv,
    PoolPyramid,
    TopDown,
    box_branch,
    class_branch,
)
from visiontrain.models.body import STRIDES, Body, Level, Size, strides_from
from visiontrain.models.config import Norm
from visiontrain.models.one_to_one import OneToOne

SIZES = {
    "yolo_n": Size((16, 32, 64, 128, 256), 1),
    "yolo_s": Size((32, 64, 128, 256, 512), 1),
    "yolo_m": Size((64, 128, 256, 512, 512), 1),
    "yolo_l": Size((64, 128, 256, 512, 512), 2),
    "yolo_x": Size((96, 192, 384, 768, 768), 2),
}


class Head(nn.Module):
    """Boxes, one-to-many classes, and what makes the classes one-to-one, if anything does."""

    def __init__(
        self,
        widths: Sequence[int],
        classes: int,
        strides: Sequence[int],
        *,
        norm: Norm,
        dual: bool,
    ) -> None:
        super().__init__()
        box, cls = max(16, widths[0] // 2), max(widths[0], min(classes, 100))
        self.strides = tuple(strides)
        self.box = nn.ModuleList(box_branch(w, box, norm=norm) for w in widths)
        self.o2m = nn.ModuleList(class_branch(w, cls, classes, norm=norm) for w in widths)
        self.o2o = OneToOne(widths) if dual else None

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Return distances (B, A, 4) in strides and logits (B, A, C): one-to-one in use.

        In training the one-to-many logits come second and the one-to-one logits last. Without
        a one-to-one branch the one-to-many logits are all there is.
        """
        many = _flat([branch(m) for branch, m in zip(self.o2m, maps, strict=True)])
        distances = _flat([branch(m) for branch, m in zip(self.box, maps, strict=True)])
        scores = many if self.o2o is None else self.o2o(maps, distances, many, self.strides)
        if self.training:
            return (distances, many) if self.o2o is None else (distances, many, scores)
        finest = [side * self.strides[0] for side in maps[0].shape[-2:]]
        return agree(distances, many, scores, finest, self.strides)


def _flat(levels: Sequence[Tensor]) -> Tensor:
    """Put maps (B, channels, H, W) of all levels behind each other: (B, A, channels)."""
    return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2)


class Yolo(VisionModel):
    """A body, a path up and a path down between its levels, and the head."""

    def __init__(
        self,
        body: Body,
        size: Size,
        classes: int,
        *,
        norm: Norm,
        finest: int = 8,
        dual: bool = True,
    ) -> None:
        """Join the parts.

        Args:
            body: offers maps at every stride from `finest` to 32.
            size: channels of the paths.
            classes: how many.
            norm: normalisation of the paths and the head.
            finest: stride of the finest level that is detected at.
            dual: whether there is a one-to-one branch.
        """
        super().__init__()
        strides = strides_from(finest)
        blocks, inputs = dict(body.blocks), dict(body.inputs)
        widths = {stride: size.widths[STRIDES.index(stride) + 1] for stride in strides}
        levels = {stride: body.levels[stride] for stride in strides}
        deepest = levels[32]
        if deepest.block != "stage5":  # our own ends in the pooling already
            reduce = Conv(deepest.channels, widths[32], 1, norm=norm)
            blocks["pool"] = nn.Sequential(reduce, PoolPyramid(widths[32], norm=norm))
            inputs["pool"] = (deepest.block,)
            levels[32] = Level("pool", widths[32])
        outputs = _paths(blocks, inputs, levels, widths, size.depth, norm)
        channels = [widths[stride] for stride in strides]
        blocks["head"] = Head(channels, classes, strides, norm=norm, dual=dual)
        inputs["head"] = outputs
        used = _reached("head", inputs)
        self.blocks = nn.ModuleDict({name: blocks[name] for name in blocks if name in used})
        self.inputs = {name: inputs[name] for name in self.blocks}
        came = [name for name in self.blocks if name in body.blocks and name not in body.added]
        trained = [name for name in came if list(blocks[name].parameters())]
        self.body = tuple(f"blocks.{name}." for name in trained)


def _reached(name: str, inputs: Mapping[str, tuple[str, ...]]) -> set[str]:
    """Name what `name` needs, itself included: a body may offer more levels than are used."""
    return {name}.union(*(_reached(source, inputs) for source in inputs.get(name, ())))


def _paths(
    blocks: dict[str, nn.Module],
    inputs: dict[str, tuple[str, ...]],
    levels: dict[int, Level],
    widths: dict[int, int],
    depth: int,
    norm: Norm,
) -> tuple[str, ...]:
    """Add the path from coarse to fine and the one back; return the head's inputs, finest first."""
    strides = list(levels)
    coarse = levels[strides[-1]]
    up = {strides[-1]: coarse}
    for stride in reversed(strides[:-1]):
        fine, name = levels[stride], f"up{stride.bit_length() - 1}"
        blocks[name] = TopDown(coarse.channels, fine.channels, widths[stride], depth, norm=norm)
        inputs[name] = (coarse.block, fine.block)
        coarse = up[stride] = Level(name, widths[stride])
    outputs = [coarse]
    for stride in strides[1:]:
        fine, side, name = outputs[-1], up[stride], f"down{stride.bit_length() - 1}"
        blocks[name] = BottomUp(fine.channels, side.channels, widths[stride], depth, norm=norm)
        inputs[name] = (fine.block, side.block)
        outputs.append(Level(name, widths[stride]))
    return tuple(level.block for level in outputs)
