"""Neighbouring anchors, put together: against the definition written as loops."""

import math

import torch
from torchvision.ops import box_iou

from visiontrain.models import agree as module
from visiontrain.models.agree import SAME, TRUST, agree
from visiontrain.ops.boxes import anchor_points, boxes_to_distances, distances_to_boxes

STRIDES, SIDE = (8, 16), 64
POINTS, STEPS = anchor_points(SIDE, SIDE, STRIDES, torch.zeros(0))


def scene(seed, images=2):
    """Anchors that see one of three objects each, a little wrongly."""
    random = torch.Generator().manual_seed(seed)
    objects = torch.tensor([[4.0, 4, 40, 40], [8, 6, 60, 50], [30, 30, 62, 62]])
    which = torch.randint(3, (images, len(POINTS)), generator=random)
    boxes = objects[which] + 2 * torch.rand(images, len(POINTS), 4, generator=random)
    many, scores = 3 * torch.randn(2, images, len(POINTS), 2, generator=random)
    return boxes_to_distances(boxes, POINTS, STEPS), many, scores


def boxes_of(distances):
    return distances_to_boxes(distances, POINTS, STEPS)


def one_by_one(distances, many, scores, asked):
    boxes, scores = boxes_of(distances), scores.clone()
    result = boxes.clone()
    for image, (found, said) in enumerate(zip(boxes, many.sigmoid(), strict=True)):
        best = said.amax(-1).argsort(descending=True)[:asked].tolist()
        overlaps = box_iou(found, found)
        for anchor in best:
            near = [other for other in best if overlaps[anchor, other] > SAME]
            total = sum(said[other].max() for other in near)
            result[image, anchor] = sum(said[other].max() * found[other] for other in near) / total
            for label in range(2):
                votes = sum(float(said[other, label]) for other in near)
                gain = TRUST * math.log(votes / float(said[anchor, label]))
                scores[image, anchor, label] += gain
    return result, scores


def test_boxes_become_the_mean_of_those_that_agree_and_gain_by_their_votes(monkeypatch):
    for seed, asked in ((0, 300), (1, 30)):
        monkeypatch.setattr(module, "ASKED", asked)
        distances, many, scores = scene(seed)
        moved, gained = agree(distances, many, scores, (SIDE, SIDE), STRIDES)
        boxes, expected = one_by_one(distances, many, scores, asked)
        torch.testing.assert_close(boxes_of(moved), boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gained, expected, rtol=1e-4, atol=1e-4)
        assert (boxes - boxes_of(distances)).abs().max() > 0.5
        assert (gained - scores).max() > 0.5


def test_boxes_without_a_side_and_lone_ones_stay():
    distances, many, scores = scene(2, images=1)
    distances[0, ::2] = -1.0  # sides beyond each other
    moved, gained = agree(distances, many, scores, (SIDE, SIDE), STRIDES)
    torch.testing.assert_close(moved[0, ::2], distances[0, ::2])
    torch.testing.assert_close(gained[0, ::2], scores[0, ::2])
    lone = torch.full_like(distances, 0.1)  # smaller than the way to the next anchor
    moved, gained = agree(lone, many, scores, (SIDE, SIDE), STRIDES)
    torch.testing.assert_close(moved, lone)
    torch.testing.assert_close(gained, scores)


def test_sixteen_bits_around_it_change_nothing():
    """Autocast would lower the products: boxes at hundreds of pixels moved by pixels."""
    given = [value.bfloat16() for value in scene(3)]
    want = agree(*(value.float() for value in given), (SIDE, SIDE), STRIDES)
    with torch.autocast("cpu", torch.bfloat16):
        got = agree(*given, (SIDE, SIDE), STRIDES)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_probability_of_zero_is_taken():
    distances, many, scores = scene(4)
    many[:, ::3] = -200.0
    moved, gained = agree(distances, many, scores, (SIDE, SIDE), STRIDES)
    assert torch.isfinite(moved).all()
    assert torch.isfinite(gained).all()
