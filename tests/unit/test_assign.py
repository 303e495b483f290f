"""The assigner against a slow loop, and its promises on small and crowded targets."""

import pytest
import torch

from visiontrain.ops.assign import Aligned, Candidates, assign
from visiontrain.ops.boxes import anchor_points, iou


def scene(seed, images=3, targets=6, classes=4, side=96):
    g = torch.Generator().manual_seed(seed)
    points, strides = anchor_points(side, side, (8, 16, 32), torch.zeros(1))
    scores = torch.rand(images, len(points), classes, generator=g)
    reach = (torch.rand(images, len(points), 4, generator=g) * 3 + 0.5) * strides[:, None]
    boxes = torch.cat([points - reach[..., :2], points + reach[..., 2:]], -1)
    corner = torch.rand(images, targets, 2, generator=g) * 70
    size = torch.rand(images, targets, 2, generator=g) * 40 + 1
    label = torch.randint(-1, classes, (images, targets, 1), generator=g).float()
    rows = torch.cat([label, corner, corner + size, torch.ones_like(label)], -1)
    return points, scores, boxes, rows


def slow(settings, scores, boxes, points, rows):
    """One image, target by target, as the paper says it."""
    claims = {}
    align = torch.zeros(len(rows), len(points))
    overlap = torch.zeros(len(rows), len(points))
    for m, row in enumerate(rows):
        if row[0] < 0:
            continue
        centre, side = (row[1:3] + row[3:5]) / 2, row[3:5] - row[1:3]
        side = torch.where(side <= 8, torch.tensor(16.0), side)
        inside = ((points - centre).abs() < side / 2).all(1)
        overlap[m] = iou(row[1:5], boxes) * inside
        align[m] = scores[:, int(row[0])] ** settings.alpha * overlap[m] ** settings.beta
        order = sorted(range(len(points)), key=lambda a: -float(align[m, a] + inside[a] * 1e-12))
        for a in order[: settings.topk]:
            if inside[a]:
                claims.setdefault(a, []).append(m)
    owner = {a: max(ms, key=lambda m: float(overlap[m, a])) for a, ms in claims.items()}
    score = torch.zeros(len(points))
    for a, m in owner.items():
        mine = [b for b, n in owner.items() if n == m]
        score[a] = align[m, a] / align[m, mine].max() * overlap[m, mine].max()
    return owner, score


@pytest.mark.parametrize("topk", [1, 3, 10])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_slow_loop(topk, seed):
    settings = Aligned(topk, 0.5, 2.0)
    points, scores, boxes, rows = scene(seed)
    got = assign(settings, scores, Candidates.of(boxes, points, rows))
    for i in range(len(rows)):
        owner, score = slow(settings, scores[i], boxes[i], points, rows[i])
        chosen = got.positive[i].nonzero()[:, 0].tolist()
        assert sorted(owner) == chosen
        assert all(owner[a] == got.target[i, a] for a in chosen)
        torch.testing.assert_close(got.score[i], score, rtol=1e-4, atol=1e-6)


def test_a_tiny_target_between_anchor_points_still_gets_an_anchor():
    points, scores, boxes, rows = scene(0, images=1, targets=1)
    rows[0, 0] = torch.tensor([0, 31.0, 31.0, 33.0, 33.0, 1])  # 2 px, on a cell corner
    candidates = Candidates.of(boxes, points, rows)
    assert assign(Aligned(10, 0.5, 6.0), scores, candidates).positive.any()


def test_every_small_target_on_whole_pixels_holds_an_anchor():
    points, _, boxes, rows = scene(0, images=1, targets=1)
    for side in range(1, 9):
        for left in range(16, 24):
            rows[0, 0] = torch.tensor([0, left, left, left + side, left + side, 1.0])
            assert Candidates.of(boxes, points, rows).inside[0, 0].any(), (side, left)


def test_padding_and_empty_images_are_never_assigned():
    points, scores, boxes, rows = scene(1)
    rows[..., 0] = -1
    got = assign(Aligned(10, 0.5, 6.0), scores, Candidates.of(boxes, points, rows))
    assert not got.positive.any()
    assert got.score.sum() == 0


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_without_overlaps_in_the_score_anchors_inside_are_chosen(alpha):
    points, scores, boxes, rows = scene(3, targets=1)
    candidates = Candidates.of(boxes, points, rows)
    got = assign(Aligned(3, alpha, 0.0), scores, candidates)
    reachable = candidates.inside.sum((1, 2)).clamp(max=3)
    assert reachable.any()
    assert got.positive.sum(1).tolist() == reachable.tolist()
