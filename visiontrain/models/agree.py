"""What neighbouring anchors say about the same object, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes, iou

ASKED = 300  # anchors of an image whose boxes are averaged
SAME = 0.8  # IoU from which two boxes are of the same object; measured, see DECISIONS.md, 17


@torch.no_grad()
def agree(distances: Tensor, logits: Tensor, size: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Replace the best anchors' boxes by their mean with all that nearly agree, by their scores.

    Several anchors answer for each object in training, and each errs a little differently: their
    mean is nearer to the object than the best scored one. In use only; nothing is learned.

    Args:
        distances: (B, A, 4) of the boxes' sides, in strides.
        logits: (B, A, C), one-to-many.
        size: height and width of the input, pixels.
        strides: of the levels, finest first.

    Returns:
        (B, A, 4) distances, in the type they came in.
    """
    wide = distances.to(torch.promote_types(distances.dtype, torch.float32))
    points, steps = anchor_points(size[0], size[1], strides, wide)
    best, index = logits.to(wide.dtype).amax(-1).topk(min(ASKED, wide.shape[1]))  # (B, K)
    places = index[..., None].expand(-1, -1, 4)
    boxes = distances_to_boxes(wide, points, steps).gather(1, places)
    near = iou(boxes[:, :, None], boxes[:, None]) > SAME  # (B, K, K)
    shares = near * best.sigmoid()[:, None]
    # A box without a side overlaps nothing, not even itself: it stays.
    total = shares.sum(-1, keepdim=True)
    mean = torch.where(total > 0, shares @ boxes / total.clamp(min=1e-12), boxes)
    sides = boxes_to_distances(mean, points[index], steps[index])
    return wide.scatter(1, places, sides).to(distances.dtype)
