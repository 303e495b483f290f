"""One-to-one scores: who stands back from whom, and how far."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from visiontrain.models.one_to_one import FAINT, TRAINED, OneToOne
from visiontrain.ops.boxes import anchor_points, distances_to_boxes

STRIDES, SIDES, WIDTHS, CLASSES = (8, 16), (6, 3), (4, 6), 3
ANCHORS = sum(side * side for side in SIDES)


@pytest.fixture
def branch():
    torch.manual_seed(0)
    made = OneToOne(WIDTHS)
    with torch.no_grad():
        for parameter in made.parameters():  # not the even start: strengths differ by place
            parameter.add_(torch.randn_like(parameter) / 2)
    return made


def scene(seed: int, images: int = 2) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    maps = [
        torch.randn(images, width, side, side, generator=random)
        for width, side in zip(WIDTHS, SIDES, strict=True)
    ]
    distances = 3 * torch.rand(images, ANCHORS, 4, generator=random)
    logits = 3 * torch.randn(images, ANCHORS, CLASSES, generator=random)
    return maps, distances, logits


def one_by_one(branch: OneToOne, maps, distances, logits) -> torch.Tensor:
    """The definition, as loops."""
    points = anchor_points(48, 48, STRIDES, logits)
    boxes = distances_to_boxes(distances, *points)
    strength = torch.cat(
        [
            torch.nn.functional.softplus(layer(m)).flatten(1)
            for layer, m in zip(branch.strength, maps, strict=True)
        ],
        1,
    )
    power = math.log1p(math.exp(branch.power.item()))
    lowered = logits.clone()
    for b in range(len(logits)):
        overlaps = box_iou(boxes[b], boxes[b])
        for a in range(ANCHORS):
            for c in range(CLASSES):
                better = logits[b, :, c] > logits[b, a, c]
                most = min(0.99, float((overlaps[a] * better).max()))
                lowered[b, a, c] -= strength[b, a] * (most / (1 - most)) ** power
    return lowered


@pytest.mark.parametrize("seed", range(5))
def test_scores_fall_by_the_odds_of_the_overlap_with_a_better_box(branch, seed):
    maps, distances, logits = scene(seed)
    assert ANCHORS * CLASSES <= TRAINED  # all are compared
    want = one_by_one(branch, maps, distances, logits)
    got = branch(maps, distances, logits, STRIDES)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (got < logits - 1).any(), "nothing had a rival"


def test_in_use_faint_scores_stay_and_the_batch_does_not_matter(branch):
    maps, distances, logits = scene(0)
    logits[0] -= 8  # one image with few scores above the floor, one with many
    with torch.no_grad():
        trained = branch(maps, distances, logits, STRIDES)
        branch.eval()
        used = branch(maps, distances, logits, STRIDES)
        alone = branch([m[:1] for m in maps], distances[:1], logits[:1], STRIDES)
    asked = logits > FAINT
    assert asked[0].any()
    assert not asked[0].all()
    assert torch.equal(used[asked], trained[asked])
    torch.testing.assert_close(alone[0][asked[0]], used[0][asked[0]])
    assert torch.equal(alone[0][~asked[0]], logits[0][~asked[0]])


def test_only_the_branch_learns(branch):
    maps, distances, logits = scene(0)
    inputs = [*maps, distances, logits]
    for tensor in inputs:
        tensor.requires_grad_()
    branch(maps, distances, logits, STRIDES).sum().backward()
    assert all(tensor.grad is None for tensor in inputs)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in branch.parameters())
