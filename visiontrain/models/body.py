"""Bodies of detectors: what turns an image into maps at strides 4 to 32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from visiontrain.core.interfaces import IMAGE
from visiontrain.models.blocks import Conv, Down, PoolPyramid
from visiontrain.models.config import Norm

STRIDES = (4, 8, 16, 32)


def strides_from(finest: int) -> tuple[int, ...]:
    """Return the strides that a detector of this finest level looks at."""
    return tuple(stride for stride in STRIDES if stride >= finest)


@dataclass(frozen=True, slots=True)
class Level:
    """A map that a body offers."""

    block: str  # which block's output it is
    channels: int


@dataclass(frozen=True, slots=True)
class Body:
    """Blocks in execution order, what each one reads, and the maps by stride."""

    blocks: Mapping[str, nn.Module]
    inputs: Mapping[str, tuple[str, ...]]
    levels: Mapping[int, Level]
    added: frozenset[str] = frozenset()  # blocks that never come pretrained


@dataclass(frozen=True, slots=True)
class Size:
    """Channels at strides 2 to 32, and bottlenecks per block."""

    widths: tuple[int, int, int, int, int]
    depth: int


def chain(names: list[str]) -> dict[str, tuple[str, ...]]:
    """Return inputs under which every block reads the one before it, the first the image."""
    return {name: (before,) for before, name in zip([IMAGE, *names], names, strict=False)}


def own_body(size: Size, norm: Norm) -> Body:
    """Make the family's own stages."""
    w1, w2, w3, w4, w5 = size.widths
    deep = size.depth
    blocks = {
        "stem": Conv(3, w1, 3, 2, norm=norm),
        "stage2": Down(w1, w2, deep, norm=norm),
        "stage3": Down(w2, w3, deep, norm=norm),
        "stage4": Down(w3, w4, deep, norm=norm),
        "stage5": nn.Sequential(Down(w4, w5, deep, norm=norm), PoolPyramid(w5, norm=norm)),
    }
    levels = zip(STRIDES, list(blocks)[1:], size.widths[1:], strict=True)
    named = {stride: Level(name, width) for stride, name, width in levels}
    return Body(blocks, chain(list(blocks)), named)
