"""Detection by torchvision's networks: they compute their own loss, and need suppression in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from visiontrain.core.types import AS_IT_IS, Batch, Detections, Loss, Views
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.detect import to_original

HEAD = "all"  # one count divides all terms
TERMS: Mapping[str, tuple[str, ...]] = {  # in the order in which the networks return them
    "fcos": ("cls", "box", "centre"),
    "retinanet": ("cls", "box"),
    "faster_rcnn": ("rpn_cls", "rpn_box", "cls", "box"),
}


@dataclass(frozen=True, slots=True)
class TorchvisionTask:
    """Names the terms that the network `kind` computed, and suppresses its candidates."""

    config: DetectConfig
    kind: str  # of the model
    best: str = "map"
    views: Views = AS_IT_IS

    @property
    def heads(self) -> tuple[str, ...]:
        """Name what loss terms are divided by."""
        return (HEAD,)

    @property
    def terms(self) -> tuple[str, ...]:
        """Name the loss terms."""
        return tuple(f"{HEAD}/{name}" for name in TERMS[self.kind])

    def head_of(self, parameter: str) -> str:
        """Name the head that trains `parameter`: there is one."""
        del parameter
        return HEAD

    def loss(self, outputs: Sequence[Tensor], batch: Batch, progress: float) -> Loss:
        """Name the sums () and, last, the count () that the network returned."""
        del batch, progress
        *sums, count = outputs
        return Loss(dict(zip(self.terms, sums, strict=True)), {HEAD: count.detach()})

    def decode(self, outputs: Sequence[Tensor], batch: Batch) -> list[Detections]:
        """Turn candidates into detections in original pixels, as torchvision does.

        Args:
            outputs: boxes (B, K, 4) in pixels of the input, scores (B, K), classes (B, K).
            batch: says where the images came from.
        """
        images = zip(*outputs, batch.frame, strict=True)
        return [self._one(*image) for image in images]

    def _one(self, boxes: Tensor, scores: Tensor, labels: Tensor, frame: Tensor) -> Detections:
        from torchvision.ops import batched_nms  # noqa: PLC0415 - a second

        some = ~(scores < self.config.conf)  # what is no number stays, to be told
        boxes, scores, labels = boxes[some], scores[some], labels[some]
        keep = batched_nms(boxes, scores, labels, self.config.iou)[: self.config.max_det]
        return Detections(to_original(boxes[keep], frame), scores[keep], labels[keep])
