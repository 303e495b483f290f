"""What neighbouring anchors say about the same object, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes, iou

TINY = 1e-12
ASKED = 300  # anchors of an image that are compared
SAME = 0.8  # IoU from which two boxes are of the same object
TRUST = 0.5  # logit that a box gains when e times as many say the same


@torch.no_grad()
def agree(
    distances: Tensor, many: Tensor, scores: Tensor, size: Sequence[int], strides: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Average the boxes of anchors that nearly agree, and trust a box more the more agree with it.

    About ten anchors answer for each object in training, and each errs a little differently:
    their mean lies nearer to the object than the best scored one, and an object that only one
    anchor sees is seldom there. In use only; nothing is learned. Constants and gains were
    measured, see DECISIONS.md, 17.

    Args:
        distances: (B, A, 4) of the boxes' sides, in strides.
        many: (B, A, C) one-to-many logits, whose probabilities are the votes.
        scores: (B, A, C) logits that are used, one-to-one or `many` themselves.
        size: height and width of the input, pixels.
        strides: of the levels, finest first.

    Returns:
        Distances and scores, at least in single precision: pixels do not fit into 16 bits.
    """
    with torch.autocast(distances.device.type, enabled=False):  # it would lower products of boxes
        wide = torch.promote_types(distances.dtype, torch.float32)
        return _agree(distances.to(wide), many.to(wide), scores.to(wide), size, strides)


def _agree(
    distances: Tensor, many: Tensor, scores: Tensor, size: Sequence[int], strides: Sequence[int]
) -> tuple[Tensor, Tensor]:
    points, steps = anchor_points(size[0], size[1], strides, distances)
    best, index = many.amax(-1).topk(min(ASKED, many.shape[1]))  # (B, K)
    boxes = distances_to_boxes(distances, points, steps).gather(1, _rows(index, 4))
    same = iou(boxes[:, :, None], boxes[:, None]) > SAME  # (B, K, K)
    same |= torch.eye(same.shape[-1], dtype=torch.bool, device=same.device)
    weights = same * best.sigmoid()[:, None]
    mean = weights @ boxes / weights.sum(-1, keepdim=True).clamp(min=TINY)
    own = many.gather(1, _rows(index, many.shape[-1])).sigmoid().clamp(min=TINY)
    votes = same.to(own.dtype) @ own / own  # (B, K, C), at least 1
    sides = boxes_to_distances(mean, points[index], steps[index])
    return (
        distances.scatter(1, _rows(index, 4), sides),
        scores.scatter_add(1, _rows(index, scores.shape[-1]), TRUST * votes.log()),
    )


def _rows(index: Tensor, columns: int) -> Tensor:
    """Repeat an index (B, K) for gathering rows of `columns` numbers."""
    return index[..., None].expand(-1, -1, columns)
