"""Boxes of neighbouring anchors, averaged: against the definition written as loops."""

import torch
from torchvision.ops import box_iou

from visiontrain.models import agree as module
from visiontrain.models.agree import SAME, agree
from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes

STRIDES, SIDE = (8, 16), 64
POINTS, STEPS = anchor_points(SIDE, SIDE, STRIDES, torch.zeros(0))


def scene(seed: int, images: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors that see one of three objects each, a little wrongly."""
    random = torch.Generator().manual_seed(seed)
    objects = torch.tensor([[4.0, 4, 40, 40], [8, 6, 60, 50], [30, 30, 62, 62]])
    which = torch.randint(3, (images, len(POINTS)), generator=random)
    boxes = objects[which] + 2 * torch.rand(images, len(POINTS), 4, generator=random)
    logits = 3 * torch.randn(images, len(POINTS), 2, generator=random)
    return boxes_to_distances(boxes, POINTS, STEPS), logits


def one_by_one(distances: torch.Tensor, logits: torch.Tensor, asked: int) -> torch.Tensor:
    boxes = distances_to_boxes(distances, POINTS, STEPS)
    result = boxes.clone()
    for image, (found, scores) in enumerate(zip(boxes, logits.amax(-1).sigmoid(), strict=True)):
        best = scores.argsort(descending=True)[:asked]
        overlaps = box_iou(found, found)
        for anchor in best.tolist():
            near = [other for other in best.tolist() if overlaps[anchor, other] > SAME]
            total = sum(scores[other] for other in near)
            result[image, anchor] = sum(scores[other] * found[other] for other in near) / total
    return result


def test_boxes_become_the_mean_of_those_that_nearly_agree(monkeypatch):
    for seed, asked in ((0, 300), (1, 30)):
        monkeypatch.setattr(module, "ASKED", asked)
        distances, logits = scene(seed)
        moved = distances_to_boxes(agree(distances, logits, (SIDE, SIDE), STRIDES), POINTS, STEPS)
        expected = one_by_one(distances, logits, asked)
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-3)
        assert (moved - distances_to_boxes(distances, POINTS, STEPS)).abs().max() > 0.5


def test_boxes_without_a_side_and_lone_ones_stay():
    distances, logits = scene(2, images=1)
    distances[0, ::2] = -1.0  # sides beyond each other
    moved = agree(distances, logits, (SIDE, SIDE), STRIDES)
    torch.testing.assert_close(moved[0, ::2], distances[0, ::2])
    lone = torch.full_like(distances, 0.1)  # smaller than the way to the next anchor
    torch.testing.assert_close(agree(lone, logits, (SIDE, SIDE), STRIDES), lone)
    assert agree(distances.bfloat16(), logits, (SIDE, SIDE), STRIDES).dtype == torch.bfloat16
