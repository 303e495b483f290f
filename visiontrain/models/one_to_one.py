"""What turns one-to-many scores into one-to-one: a score stands back from better ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontrain.ops.boxes import anchor_points, distances_to_boxes, iou

TRAINED, USED = 150, 1000  # scores of an image that are compared, in training and in use
ROWS = 128  # compared at a time: what they make stays in a processor's cache
FAINT = math.log(0.001 / 0.999)  # logit under which nobody asks whether it is a duplicate
STRENGTH, POWER = 0.5, 1.0  # measured, see DECISIONS.md, 6; training moves them from there


class OneToOne(nn.Module):
    """Lowers the logit of every duplicate: `strength * (overlap / (1 - overlap)) ** power`.

    The overlap is the largest with a better scored box of the same class; the strength is read
    from the features at the anchor, so that crowded places can be told from doubled boxes. Only
    the best scores of an image are compared. Everything comes in detached: the branch learns
    from its own loss and changes nothing else. No threshold, no loop: a few tensor operations.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.strength = nn.ModuleList(_constant(width, STRENGTH) for width in widths)
        self.power = nn.Parameter(torch.full((1,), _inverse_softplus(POWER)))

    def forward(
        self, maps: Sequence[Tensor], distances: Tensor, logits: Tensor, strides: Sequence[int]
    ) -> Tensor:
        """Return one-to-one logits (B, A, C).

        Args:
            maps: features (B, width, H, W) of each level, finest first.
            distances: (B, A, 4) of the boxes' sides, in strides.
            logits: (B, A, C), one-to-many.
            strides: of the levels, pixels.
        """
        classes = logits.shape[-1]
        # Boxes and ranks need full precision, whatever the network runs in.
        wide = torch.promote_types(logits.dtype, torch.float32)
        many = logits.detach().to(wide).flatten(1)  # (B, A * C): every class of every anchor
        best, index = many.topk(self._compared(many))  # best first
        anchor, label = index // classes, index % classes  # (B, K)
        boxes = _boxes(maps[0], distances.detach().to(wide), strides)
        boxes = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))
        overlap = _overlap_with_better(label, boxes)
        levels = [layer(m.detach()) for layer, m in zip(self.strength, maps, strict=True)]
        strength = torch.cat([level.flatten(1) for level in levels], 1).to(wide).gather(1, anchor)
        odds = overlap / (1 - overlap)
        lowered = best - F.softplus(strength) * odds ** F.softplus(self.power)
        return many.scatter(1, index, lowered.to(wide)).view_as(logits)

    def _compared(self, many: Tensor) -> int:
        """Return how many scores of an image are compared."""
        if self.training:  # a fixed number: counting would wait for a GPU
            return min(TRAINED, many.shape[1])
        faint = int((many > FAINT).sum(1).amax())
        return min(USED, max(1, faint))


def _boxes(finest: Tensor, distances: Tensor, strides: Sequence[int]) -> Tensor:
    height, width = (side * strides[0] for side in finest.shape[-2:])
    return distances_to_boxes(distances, *anchor_points(height, width, strides, distances))


@torch.no_grad()
def _overlap_with_better(label: Tensor, boxes: Tensor) -> Tensor:
    """Return each box's largest IoU with one of its class before it, (B, K), at most 0.99."""
    found = []
    for start in range(0, boxes.shape[1], ROWS):  # no row needs the columns after it
        stop = start + ROWS
        same = label[:, start:stop, None] == label[:, None, :stop]  # (B, ROWS, stop)
        overlap = iou(boxes[:, start:stop, None], boxes[:, None, :stop])
        found.append((overlap * same.tril(start - 1)).amax(-1))
    return torch.cat(found, 1).clamp(max=0.99)


def _constant(width: int, value: float) -> nn.Conv2d:
    """Return a 1x1 convolution whose softplus starts as `value` everywhere."""
    layer = nn.Conv2d(width, 1, 1)
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, _inverse_softplus(value))
    return layer


def _inverse_softplus(value: float) -> float:
    return math.log(math.expm1(value))
