"""Object detection: the dual-head loss, and decoding.

B images, M targets, A anchors, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visiontrain.core.types import AS_IT_IS, Batch, Detections, Loss, Views
from visiontrain.ops.assign import Aligned, Assignment, Candidates, assign, joined
from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes
from visiontrain.ops.losses import classification_sum, distance_sum, overlap_sum
from visiontrain.tasks.config import DetectConfig

ONE_TO_MANY, ONE_TO_ONE = "o2m", "o2o"
# Images times targets times anchors compared at once, but at least one image: tensors of 64 MB
# each, or 136 MB where a thousand targets meet the anchors of 640 pixels from stride 4 on.
COMPARED = 2**24
SUPPRESSED = 3000  # pairs of anchors and classes at least that are compared with each other
# One-to-one takes the anchor that scores best already, as suppression would: which of several
# good boxes overlaps best changes from step to step and cannot be learned.
CONSISTENT = Aligned(topk=1, alpha=1.0, beta=1 / 6)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where the anchors of one input size lie."""

    points: Tensor  # (A, 2) pixels
    strides: Tensor  # (A,)

    @classmethod
    def of(cls, images: Tensor, strides: Sequence[int], like: Tensor) -> Grid:
        """Make the grid of levels `strides` for `images` (B, 3, H, W), in the type of `like`."""
        height, width = images.shape[-2:]
        return cls(*anchor_points(height, width, strides, like))


@dataclass(frozen=True, slots=True)
class Truth:
    """What each anchor should say."""

    boxes: Tensor  # (B, A, 4) pixels; meaningless where the weight is 0
    weight: Tensor  # (B, A): how much the anchor's box matters
    scores: Tensor  # (B, A, C): soft class targets

    @classmethod
    def of(cls, matched: Assignment, batch: Batch, logits: Tensor) -> Truth:
        """Look up what an assignment asks of each anchor, in the shape of `logits`."""
        index = matched.target[..., None].expand(-1, -1, 6)
        rows = batch.targets.to(logits.dtype).gather(1, index)  # (B, A, 6)
        weight = matched.score * rows[..., 5] * batch.valid.to(logits.dtype)[:, None]
        label = rows[..., :1].long().clamp(min=0)
        return cls(
            rows[..., 1:5], weight, torch.zeros_like(logits).scatter_(2, label, weight[..., None])
        )


@dataclass(frozen=True, slots=True)
class DetectTask:
    """Loss and decoding of a detector with `num_classes` classes."""

    config: DetectConfig
    num_classes: int
    strides: tuple[int, ...] = (8, 16, 32)  # of the model's levels, finest first
    dual: bool = True  # the model has a one-to-one branch
    best: str = "map"
    views: Views = AS_IT_IS

    @property
    def heads(self) -> tuple[str, ...]:
        """Name what loss terms are divided by."""
        return (ONE_TO_MANY, ONE_TO_ONE) if self.dual else (ONE_TO_MANY,)

    @property
    def terms(self) -> tuple[str, ...]:
        """Name the loss terms."""
        many = ("o2m/box", "o2m/cls", "o2m/l1")
        return (*many, "o2o/cls") if self.dual else many

    def head_of(self, parameter: str) -> str:
        """Name the head that trains `parameter`: one-to-one branches see detached maps."""
        return ONE_TO_ONE if f".{ONE_TO_ONE}." in parameter else ONE_TO_MANY

    def loss(self, outputs: Sequence[Tensor], batch: Batch, progress: float) -> Loss:
        """Compare boxes and both kinds of class logits with the targets.

        Args:
            outputs: distances (B, A, 4), one-to-many logits and, from a dual head, one-to-one
                logits (B, A, C).
            batch: targets in pixels of the input; `valid=0` images add to no term.
            progress: share of the run done; this task does not need it.
        """
        del progress
        # Overlaps and logarithms need full precision, whatever the network ran in.
        wide = torch.promote_types(outputs[0].dtype, torch.float32)
        distances, many, *ones = (output.to(wide) for output in outputs)
        grid = Grid.of(batch.images, self.strides, distances)
        boxes = distances_to_boxes(distances, grid.points, grid.strides)
        matched = self._match([many, *ones], boxes.detach(), grid.points, batch.targets.to(wide))
        truth = Truth.of(matched[0], batch, many)
        sides = boxes_to_distances(truth.boxes, grid.points, grid.strides)
        # Dense, with weight 0 where unassigned: no device sync, and every parameter gets a
        # gradient also when no image has a box.
        terms = {
            "o2m/box": self.config.box * overlap_sum(boxes, truth.boxes, truth.weight),
            "o2m/cls": self.config.cls * classification_sum(many, truth.scores, batch.valid),
            "o2m/l1": self.config.l1 * distance_sum(distances, sides, truth.weight),
        }
        counts = {ONE_TO_MANY: truth.weight.sum()}
        for one, chosen in zip(ones, matched[1:], strict=True):
            single = Truth.of(chosen, batch, one)
            loss = classification_sum(one, single.scores, batch.valid)
            terms["o2o/cls"] = self.config.cls * loss
            counts[ONE_TO_ONE] = single.weight.sum()
        return Loss(terms, {head: count.detach() for head, count in counts.items()})

    def _match(
        self, logits: Sequence[Tensor], boxes: Tensor, points: Tensor, targets: Tensor
    ) -> list[Assignment]:
        """Assign under each head, as many images at a time as fit into `COMPARED`."""
        count = max(1, COMPARED // (targets.shape[1] * len(points)))
        parts: list[list[Assignment]] = []
        for start in range(0, max(1, len(boxes)), count):  # also where a rank has no image
            part = slice(start, start + count)
            candidates = Candidates.of(boxes[part], points, targets[part])
            heads = zip(self.heads, logits, strict=True)
            parts.append([self._assign(head, said[part], candidates) for head, said in heads])
        return [joined(of_head) for of_head in zip(*parts, strict=True)]

    def _assign(self, head: str, logits: Tensor, candidates: Candidates) -> Assignment:
        """Choose the anchors that answer for each target under `head`."""
        many = Aligned(self.config.topk, self.config.alpha, self.config.beta)
        settings = many if head == ONE_TO_MANY else CONSISTENT
        return assign(settings, logits.detach().sigmoid(), candidates)

    def decode(self, outputs: Sequence[Tensor], batch: Batch) -> list[Detections]:
        """Turn one head's distances and logits into detections in original pixels.

        Each anchor may answer for several classes; the best `max_det` pairs stay, best first. With
        suppression they are the best of what is left: about ten anchors answer for each object.
        """
        distances, logits = outputs[-2].float(), outputs[-1].float()
        grid = Grid.of(batch.images, self.strides, distances)
        boxes = distances_to_boxes(distances, grid.points, grid.strides)
        images = zip(boxes, logits.sigmoid(), batch.frame, strict=True)
        return [self._one(*image) for image in images]

    def _one(self, boxes: Tensor, scores: Tensor, frame: Tensor) -> Detections:
        most = self.config.max_det
        count = min(max(SUPPRESSED, 10 * most) if self.config.nms else most, scores.numel())
        values, index = scores.flatten().topk(count)
        good = ~(values < self.config.conf)  # what is no number stays, to be told
        values, index = values[good], index[good]
        anchor, label = index // self.num_classes, index % self.num_classes
        original = to_original(boxes[anchor], frame)
        keep = slice(None)
        if self.config.nms:
            from torchvision.ops import batched_nms  # noqa: PLC0415 - a second, rarely used

            keep = batched_nms(original, values, label, self.config.iou)[:most]
        return Detections(original[keep], values[keep], label[keep])


def to_original(boxes: Tensor, frame: Tensor) -> Tensor:
    """Map boxes (N, 4) from the letterboxed input to the original image, clipped to it."""
    scale, pad_x, pad_y, width, height = frame.to(boxes.dtype)
    moved = (boxes - torch.stack([pad_x, pad_y, pad_x, pad_y])) / scale
    zero = torch.zeros_like(width)
    return moved.clamp(torch.stack([zero] * 4), torch.stack([width, height, width, height]))
