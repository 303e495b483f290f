"""ops/boxes against slow, obvious versions."""

import math

import pytest
import torch
from torchvision.ops import box_iou, complete_box_iou

from visiontrain.ops.boxes import (
    anchor_points,
    boxes_to_distances,
    complete_iou,
    distances_to_boxes,
    iou,
)


def random_boxes(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 100
    side = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 60 + 0.5
    return torch.cat([corner, corner + side], 1)


def test_iou_and_complete_iou_equal_torchvision_pairwise():
    first, second = random_boxes(40, 1), random_boxes(50, 2)
    pairs = first[:, None], second[None]
    torch.testing.assert_close(iou(*pairs), box_iou(first, second), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        complete_iou(*pairs), complete_box_iou(first, second), atol=1e-6, rtol=0
    )


def test_complete_iou_has_a_gradient_where_boxes_do_not_touch():
    box = torch.tensor([0.0, 0.0, 10.0, 10.0], requires_grad=True)
    complete_iou(box, torch.tensor([50.0, 0.0, 60.0, 10.0])).backward()
    assert box.grad is not None
    assert box.grad[0] + box.grad[2] > 0  # shifting right brings it nearer
    assert torch.isfinite(box.grad).all()


def test_empty_boxes_give_finite_values():
    empty = torch.zeros(1, 4, requires_grad=True)
    complete_iou(empty, torch.zeros(1, 4)).sum().backward()
    assert torch.isfinite(empty.grad).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160), (32, 320)])
def test_anchor_points_are_cell_centres_in_the_order_of_flattened_maps(height, width):
    points, strides = anchor_points(height, width, (8, 16, 32), torch.zeros(1))
    slow = [
        ((x + 0.5) * s, (y + 0.5) * s, s)
        for s in (8, 16, 32)
        for y in range(math.ceil(height / s))
        for x in range(math.ceil(width / s))
    ]
    assert torch.cat([points, strides[:, None]], 1).tolist() == [list(row) for row in slow]


def test_distances_round_trip():
    points, strides = anchor_points(64, 64, (8, 16, 32), torch.zeros(1, dtype=torch.float64))
    boxes = random_boxes(len(points), 3)[None]
    there = boxes_to_distances(boxes, points, strides)
    torch.testing.assert_close(distances_to_boxes(there, points, strides), boxes)
