"""Object detection: the dual-head loss, and decoding.

B images, M targets, A anchors, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from visiontrain.core.types import Batch, Detections, Loss
from visiontrain.models.yolo import STRIDES
from visiontrain.ops.assign import Aligned, Assignment, assign
from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes
from visiontrain.ops.losses import classification_sum, distance_sum, overlap_sum
from visiontrain.tasks.config import DetectConfig

ONE_TO_MANY, ONE_TO_ONE = "o2m", "o2o"


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the anchors of one input size lie."""

    points: Tensor  # (A, 2) pixels
    strides: Tensor  # (A,)

    @classmethod
    def of(cls, images: Tensor, like: Tensor) -> Grid:
        """Make the grid for `images` (B, 3, H, W), in the type of `like`."""
        return cls(*anchor_points(*images.shape[-2:], STRIDES, like))


@dataclass(frozen=True, slots=True)
class DetectTask:
    """Loss and decoding of a dual-head detector with `num_classes` classes."""

    config: DetectConfig
    num_classes: int
    best: str = "map"
    heads: tuple[str, ...] = (ONE_TO_MANY, ONE_TO_ONE)
    terms: tuple[str, ...] = tuple(
        f"{head}/{term}" for head in (ONE_TO_MANY, ONE_TO_ONE) for term in ("box", "cls", "l1")
    )

    def head_of(self, parameter: str) -> str:
        """Name the head that trains `parameter`: the one-to-one branches see detached maps."""
        return ONE_TO_ONE if f".{ONE_TO_ONE}." in parameter else ONE_TO_MANY

    def loss(self, outputs: Sequence[Tensor], batch: Batch, progress: float) -> Loss:
        """Compare both heads with the targets.

        Args:
            outputs: distances (B, A, 4) and logits (B, A, C) of the one-to-many head, then
                of the one-to-one head.
            batch: targets in pixels of the input; `valid=0` images add to no term.
            progress: share of the run done; moves weight from the first head to the second.
        """
        many = 0.8 - 0.7 * progress  # ProgLoss of YOLO26: 0.8 to 0.1
        heads = zip(self.heads, (outputs[:2], outputs[2:]), (many, 1 - many), strict=True)
        terms: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        for name, (distances, logits), gain in heads:
            sums, counts[name] = self._head(name, distances, logits, batch)
            terms |= {f"{name}/{term}": gain * value for term, value in sums.items()}
        return Loss(terms, counts)

    def _head(
        self, name: str, distances: Tensor, logits: Tensor, batch: Batch
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return one head's sums, gains included, and the count that goes with them."""
        # Overlaps and logarithms need full precision, whatever the network ran in.
        wide = torch.promote_types(distances.dtype, torch.float32)
        distances, logits = distances.to(wide), logits.to(wide)
        grid = Grid.of(batch.images, distances)
        boxes = distances_to_boxes(distances, grid.points, grid.strides)
        targets = batch.targets.to(wide)
        matched = self.assign(name, logits, boxes, grid, targets)
        answered = targets.gather(1, matched.target[..., None].expand(-1, -1, 6))  # (B, A, 6)
        weight = matched.score * answered[..., 5] * batch.valid[:, None]  # (B, A)
        wanted = torch.zeros_like(logits).scatter_(
            2, answered[..., :1].long().clamp(min=0), (matched.score * answered[..., 5])[..., None]
        )
        truth = answered[..., 1:5]
        side = boxes_to_distances(truth, grid.points, grid.strides)
        # Dense, with weight 0 where unassigned: no device sync, and every parameter gets a
        # gradient also when no image has a box.
        sums = {
            "box": self.config.box * overlap_sum(boxes, truth, weight),
            "cls": self.config.cls * classification_sum(logits, wanted, batch.valid),
            "l1": self.config.l1 * distance_sum(distances, side, weight),
        }
        return sums, weight.sum().detach()

    def assign(
        self, name: str, logits: Tensor, boxes: Tensor, grid: Grid, targets: Tensor
    ) -> Assignment:
        """Choose the anchors that answer for each target under head `name`."""
        topk = self.config.topk if name == ONE_TO_MANY else 1
        settings = Aligned(topk, self.config.alpha, self.config.beta)
        return assign(settings, logits.detach().sigmoid(), boxes.detach(), grid.points, targets)

    def decode(self, outputs: Sequence[Tensor], batch: Batch) -> list[Detections]:
        """Turn one head's distances and logits into detections in original pixels.

        Each anchor may answer for several classes; the best `max_det` pairs stay, best first.
        """
        distances, logits = outputs[-2].float(), outputs[-1].float()
        grid = Grid.of(batch.images, distances)
        boxes = distances_to_boxes(distances, grid.points, grid.strides)
        images = zip(boxes, logits.sigmoid(), batch.frame, strict=True)
        return [self._one(*image) for image in images]

    def _one(self, boxes: Tensor, scores: Tensor, frame: Tensor) -> Detections:
        count = min(self.config.max_det, scores.numel())
        values, index = scores.flatten().topk(count)
        index = index[values >= self.config.conf]
        values = values[: len(index)]
        anchor, label = index // self.num_classes, index % self.num_classes
        original = _to_original(boxes[anchor], frame)
        keep = slice(None)
        if self.config.nms:
            keep = batched_nms(original, values, label, self.config.iou)
        return Detections(original[keep], values[keep], label[keep])


def _to_original(boxes: Tensor, frame: Tensor) -> Tensor:
    """Map boxes (N, 4) from the letterboxed input to the original image, clipped to it."""
    scale, pad_x, pad_y, width, height = frame.to(boxes.dtype)
    moved = (boxes - torch.stack([pad_x, pad_y, pad_x, pad_y])) / scale
    zero = torch.zeros_like(width)
    return moved.clamp(torch.stack([zero] * 4), torch.stack([width, height, width, height]))
