"""Boxes as tensors: overlaps, anchor points, distances to and from points.

Boxes are xyxy in pixels. B images, M targets, A anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-9


def area(boxes: Tensor) -> Tensor:
    """Return the areas (...,) of boxes (..., 4); zero where a side is negative."""
    left, top, right, bottom = _sides(boxes)
    return (right - left).clamp(min=0) * (bottom - top).clamp(min=0)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Return intersection over union of boxes (..., 4) that broadcast against each other."""
    left, top, right, bottom = _sides(first)
    other_left, other_top, other_right, other_bottom = _sides(second)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    inside = width.clamp(min=0) * height.clamp(min=0)
    return inside / (area(first) + area(second) - inside + EPSILON)


def _sides(boxes: Tensor) -> tuple[Tensor, ...]:
    """Lay the four sides (...,) out one after another: arithmetic on them is then vectorised."""
    return boxes.movedim(-1, 0).contiguous().unbind(0)


def complete_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return CIoU (Zheng et al. 2020, arXiv 1911.08287): IoU less distance and shape terms.

    Shapes as in `iou`; values in (-1.5, 1]. The weight of the shape term carries no gradient.
    """
    overlap = iou(first, second)
    lower = torch.minimum(first[..., :2], second[..., :2])
    upper = torch.maximum(first[..., 2:], second[..., 2:])
    diagonal = (upper - lower).square().sum(-1) + EPSILON
    centres = first[..., :2] + first[..., 2:] - second[..., :2] - second[..., 2:]
    distance = centres.square().sum(-1) / 4
    shape = (4 / math.pi**2) * (_angle(first) - _angle(second)).square()
    with torch.no_grad():
        weight = shape / (1 - overlap + shape + EPSILON)
    return overlap - distance / diagonal - weight * shape


def _angle(boxes: Tensor) -> Tensor:
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=EPSILON)
    return torch.atan2(sides[..., 0], sides[..., 1])


def anchor_points(
    height: int, width: int, strides: Sequence[int], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return cell centres (A, 2) in pixels and their strides (A,), finest level first.

    A level's grid has ceil(side / stride) cells a side, as stride-2 convolutions make.
    """
    points, sizes = [], []
    for stride in strides:
        ys = torch.arange(-(-height // stride), dtype=like.dtype, device=like.device)
        xs = torch.arange(-(-width // stride), dtype=like.dtype, device=like.device)
        grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).reshape(-1, 2)
        points.append((grid + 0.5) * stride)
        sizes.append(torch.full_like(grid[:, 0], stride))
    return torch.cat(points), torch.cat(sizes)


def distances_to_boxes(distances: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Turn left, top, right, bottom distances (B, A, 4) in stride units into boxes (B, A, 4)."""
    offsets = distances * strides[..., None]
    return torch.cat([points - offsets[..., :2], points + offsets[..., 2:]], -1)


def boxes_to_distances(boxes: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Inverse of `distances_to_boxes`; negative where a point lies outside its box."""
    offsets = torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)
    return offsets / strides[..., None]
