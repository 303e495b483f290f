"""Loss sums of a detector; each returns a sum over the micro-batch, never a mean."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from visiontrain.ops.boxes import complete_iou


def classification_sum(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Sum binary cross-entropy of logits and soft targets (B, A, C), weighted by image (B,)."""
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (loss.sum((1, 2)) * weight).sum()


def overlap_sum(boxes: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Sum 1 - CIoU of paired boxes (..., 4), weighted by (...,)."""
    return ((1 - complete_iou(boxes, truth)) * weight).sum()


def distance_sum(distances: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Sum the mean absolute error of paired distances (..., 4) in stride units, weighted by (...,).

    The unit matters: in pixels this term outweighs all others and costs most of the mAP.
    """
    return ((distances - truth).abs().mean(-1) * weight).sum()
