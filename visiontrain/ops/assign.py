"""Task-aligned assignment: which anchors answer for which target, and how strongly.

Feng et al. 2021 (arXiv 2108.07755), with one-to-many and one-to-one as its two settings.
B images, M targets (padded), A anchors, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontrain.ops.boxes import iou

SMALL_SIDE, REPLACED_SIDE = 8.0, 16.0  # pixels


@dataclass(frozen=True, slots=True)
class Assignment:
    """For each anchor, the target it answers for."""

    target: Tensor  # (B, A) int64: index into M; 0 where unassigned
    positive: Tensor  # (B, A) bool
    score: Tensor  # (B, A): classification target of the assigned class, 0 where unassigned


def joined(parts: Sequence[Assignment]) -> Assignment:
    """Put assignments of different images behind each other."""
    if len(parts) == 1:
        return parts[0]
    target, positive, score = (
        torch.cat([getattr(part, name) for part in parts])
        for name in ("target", "positive", "score")
    )
    return Assignment(target, positive, score)


@dataclass(frozen=True, slots=True)
class Aligned:
    """Settings of the assigner."""

    topk: int
    alpha: float
    beta: float


@dataclass(frozen=True, slots=True)
class Candidates:
    """Which anchors may answer for which target; the same for all settings."""

    labels: Tensor  # (B, M) int64, -1 where padded
    inside: Tensor  # (B, M, A) bool: the anchor's point lies in the target
    overlap: Tensor  # (B, M, A): IoU of the anchor's box and the target, 0 where not inside

    @classmethod
    @torch.no_grad()
    def of(cls, boxes: Tensor, points: Tensor, targets: Tensor) -> Candidates:
        """Compare predicted boxes with targets.

        Args:
            boxes: (B, A, 4), predicted.
            points: (A, 2) anchor points.
            targets: (B, M, 6) class, x1, y1, x2, y2, weight; class -1 pads.
        """
        labels, truth = targets[..., 0].long(), targets[..., 1:5]
        inside = _inside(points, truth) & (labels >= 0)[..., None]
        overlap = iou(truth[:, :, None], boxes[:, None]).clamp_(0, 1) * inside
        return cls(labels, inside, overlap)


@torch.no_grad()
def assign(settings: Aligned, scores: Tensor, candidates: Candidates) -> Assignment:
    """Assign anchors to targets by score^alpha * IoU^beta, the best `topk` for each target.

    Args:
        settings: how many anchors a target gets, and the two exponents.
        scores: (B, A, C) class probabilities.
        candidates: who may answer for whom.
    """
    inside, overlap = candidates.inside, candidates.overlap
    index = candidates.labels.clamp(min=0)[..., None].expand(-1, -1, scores.shape[1])
    class_score = scores.transpose(1, 2).gather(1, index)  # (B, M, A)
    align = class_score.pow(settings.alpha) * overlap.pow(settings.beta)
    # Those outside come last even at beta 0, where every overlap counts alike.
    chosen = _best(torch.where(inside, align + 1e-12, -1.0), settings.topk) & inside
    target, positive = _one_target_each(chosen, overlap)
    return Assignment(target, positive, _soft_score(target, positive, align, overlap))


def _inside(points: Tensor, truth: Tensor) -> Tensor:
    """Tell which points lie in which targets; a side up to 8 px counts as 16 px.

    The widening is the small-target rule of YOLO26 (arXiv 2606.03748, eq. 4 to 6): every
    target then holds at least one point of the finest level.
    """
    centre, side = (truth[..., :2] + truth[..., 2:]) / 2, truth[..., 2:] - truth[..., :2]
    half = torch.where(side <= SMALL_SIDE, torch.full_like(side, REPLACED_SIDE), side) / 2
    across, down = (  # one axis at a time: half the memory
        (points[:, axis] - centre[..., axis, None]).abs() < half[..., axis, None] for axis in (0, 1)
    )
    return across & down


def _best(align: Tensor, topk: int) -> Tensor:
    """Mark each target's `topk` largest values of (B, M, A)."""
    index = align.topk(min(topk, align.shape[-1]), dim=-1).indices
    return torch.zeros_like(align, dtype=torch.bool).scatter_(-1, index, value=True)


def _one_target_each(chosen: Tensor, overlap: Tensor) -> tuple[Tensor, Tensor]:
    """Give an anchor that several targets chose to the one it overlaps most."""
    rank = torch.where(chosen, overlap, -1.0)  # (B, M, A)
    best, target = rank.max(1)
    return target, best >= 0


def _soft_score(target: Tensor, positive: Tensor, align: Tensor, overlap: Tensor) -> Tensor:
    """Scale alignments so that each target's best anchor gets that target's best overlap."""
    mine = torch.zeros_like(align, dtype=torch.bool)
    mine.scatter_(1, target[:, None], positive[:, None])  # (B, M, A), after conflicts
    align, overlap = align * mine, overlap * mine
    best_align, best_overlap = align.amax(-1), overlap.amax(-1)  # (B, M)
    scaled = align * (best_overlap / best_align.clamp(min=1e-30))[..., None]
    return scaled.gather(1, target[:, None])[:, 0] * positive
