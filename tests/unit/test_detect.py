"""The detection task: sums that add up, divisors, padding images, decoding."""

import dataclasses
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visiontrain.core.types import Batch
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.tasks import detect
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.registry import build_task

SIDE, CLASSES = 64, 3


def batch_of(images, seed=0, boxes=4):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, boxes, 2, generator=g) * 30
    size = torch.rand(images, boxes, 2, generator=g) * 30 + 3
    label = torch.randint(0, CLASSES, (images, boxes, 1), generator=g)
    rows = torch.cat([label, corner, corner + size, torch.ones(images, boxes, 1)], -1)
    frame = torch.tensor([[1.0, 0, 0, SIDE, SIDE]]).repeat(images, 1)
    pixels = torch.rand(images, 3, SIDE, SIDE, generator=g)
    return Batch(pixels, rows, torch.arange(images), frame, torch.ones(images)).to(
        torch.device("cpu"), torch.float64
    )


def part(batch, where):
    return Batch(*(getattr(batch, f.name)[where] for f in dataclasses.fields(batch)))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(YoloN(norm="group"), CLASSES).double()


@pytest.fixture(scope="module")
def task():
    return build_task(DetectConfig(), CLASSES, YoloN())


def gradient(model, task, batches):
    model.zero_grad()
    losses = [task.loss(model(b.images), b, 0.3) for b in batches]
    for loss in losses:
        loss.total().backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_terms_counts_and_gradients_of_parts_add_up_to_the_whole(model, task):
    batch = batch_of(5)
    (whole,), want = gradient(model, task, [batch])
    parts, got = gradient(model, task, [part(batch, slice(0, 2)), part(batch, slice(2, 5))])
    for name, value in whole.terms.items():
        torch.testing.assert_close(sum(p.terms[name] for p in parts), value)
    for name, value in whole.counts.items():
        torch.testing.assert_close(sum(p.counts[name] for p in parts), value)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=1e-9, rtol=1e-7)


def test_each_parameter_answers_to_the_terms_of_one_head_only(model, task):
    """What lets gradients be divided by a head's count after they were summed."""
    batch = batch_of(2)
    loss = task.loss(model(batch.images), batch, 0.3)
    assert set(loss.terms) == set(task.terms)
    assert set(loss.counts) == set(task.heads)
    named = dict(model.named_parameters())
    for head in task.heads:
        total = sum(v for name, v in loss.terms.items() if name.startswith(head))
        grads = torch.autograd.grad(total, named.values(), retain_graph=True, allow_unused=True)
        reached = {n for n, g in zip(named, grads, strict=True) if g is not None and g.any()}
        assert reached
        assert {task.head_of(name) for name in reached} == {head}


def test_an_image_that_only_fills_a_place_adds_nothing(model, task):
    batch = batch_of(3)
    filled = dataclasses.replace(batch, valid=torch.tensor([1.0, 1, 0]).double())
    (want,), grads = gradient(model, task, [part(batch, slice(0, 2))])
    (got,), padded = gradient(model, task, [filled])
    torch.testing.assert_close(got.total(), want.total())
    torch.testing.assert_close(dict(got.counts), dict(want.counts))
    torch.testing.assert_close(padded, grads, atol=1e-9, rtol=1e-7)


def test_every_parameter_gets_a_gradient_without_a_single_box(model, task):
    batch = batch_of(2)
    batch.targets[..., 0] = -1
    _, grads = gradient(model, task, [batch])
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert all(torch.isfinite(g).all() for g in grads.values())


def test_box_terms_balance_at_the_start(model, task):
    """A wrong unit of the L1 term (pixels instead of strides) multiplies it by 8 to 32."""
    (loss,), _ = gradient(model, task, [batch_of(4)])
    ratio = loss.terms["o2m/l1"] / loss.terms["o2m/box"]
    assert 0.02 < ratio < 0.5


def test_decode_inverts_the_letterbox_and_keeps_the_best(task):
    config = DetectConfig(max_det=2, conf=0.1)
    task = build_task(config, CLASSES, YoloN())
    distances, logits = torch.ones(1, 84, 4), torch.full((1, 84, CLASSES), -9.0)
    logits[0, 9, 1], logits[0, 80, 2], logits[0, 0, 0] = 2.0, 1.0, 0.0
    batch = batch_of(1)
    batch = dataclasses.replace(batch, frame=torch.tensor([[0.5, 0.0, 8.0, 128.0, 96.0]]))
    (found,) = task.decode((distances, logits), batch)
    assert found.classes.tolist() == [1, 2]
    torch.testing.assert_close(found.scores, torch.tensor([2.0, 1.0]).sigmoid())
    # anchor 9: cell (1, 1) of stride 8, centre (12, 12): box 4..20 of the input
    assert found.boxes[0].tolist() == [8.0, 0.0, 40.0, 24.0]


@pytest.mark.parametrize("nms", [False, True])
def test_scores_that_are_no_numbers_are_kept_for_whoever_looks(nms):
    """Left out, broken weights would be said to find nothing."""
    task = build_task(DetectConfig(conf=0.1, nms=nms), CLASSES, YoloN())
    distances, logits = torch.ones(1, 84, 4), torch.full((1, 84, CLASSES), -9.0)
    logits[0, 9, 1], logits[0, 80, 2] = 2.0, torch.nan
    (found,) = task.decode((distances, logits), batch_of(1))
    by_class = dict(zip(found.classes.tolist(), found.scores.tolist(), strict=True))
    assert by_class[1] == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert math.isnan(by_class[2])


def test_suppression_leaves_as_many_objects_as_are_kept():
    """Ten anchors answer for each: the best pairs alone are of a few objects."""
    objects, anchors = 40, 10
    some = build_task(DetectConfig(conf=0.1, nms=True, iou=0.5, max_det=30), 1, YoloN())
    places = torch.arange(objects).repeat_interleave(anchors).float() * 16
    boxes = torch.stack([places, places, places + 12, places + 12], 1)
    scores = torch.linspace(0.9, 0.2, objects).repeat_interleave(anchors)[:, None]
    found = some._one(boxes, scores, torch.tensor([1.0, 0, 0, 700, 700]))
    assert found.boxes[:, 0].tolist() == [16.0 * k for k in range(30)]


def test_nms_is_off_unless_asked(task):
    distances, logits = torch.full((1, 84, 4), 3.0), torch.full((1, 84, CLASSES), -9.0)
    logits[0, 9, 1], logits[0, 10, 1] = 2.0, 1.0
    outputs, batch = (distances, logits), batch_of(1)
    merged = build_task(DetectConfig(conf=0.1, nms=True, iou=0.5), CLASSES, YoloN())
    plain = build_task(DetectConfig(conf=0.1), CLASSES, YoloN())
    assert len(plain.decode(outputs, batch)[0].scores) == 2
    assert len(merged.decode(outputs, batch)[0].scores) == 1


def test_terms_are_in_strides_so_size_does_not_weigh(model, task):
    """The same scene at twice the size, on levels twice as coarse, costs the same."""
    batch = batch_of(3)
    batch.targets[..., 3:5] += 10  # wider than what the small-target rule changes
    outputs = model(batch.images)
    rows = batch.targets.clone()
    rows[..., 1:5] *= 2
    pixels = torch.zeros(3, 3, 2 * SIDE, 2 * SIDE)
    twice = dataclasses.replace(batch, images=pixels, targets=rows)
    coarse = dataclasses.replace(task, strides=(16, 32, 64))
    want, got = task.loss(outputs, batch, 0.3), coarse.loss(outputs, twice, 0.3)
    for name, value in want.terms.items():
        torch.testing.assert_close(got.terms[name], value)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [result] if isinstance(result, torch.Tensor) else []
        self.elements = max([self.elements, *(t.numel() for t in made)])
        return result


def test_a_crowd_is_assigned_some_images_at_a_time_as_it_would_be_at_once(model, task, monkeypatch):
    batch = batch_of(5, boxes=1000)
    outputs = [output.detach() for output in model(batch.images)]
    want = task.loss(outputs, batch, 0.3)
    whole = 5 * 1000 * outputs[0].shape[1]
    monkeypatch.setattr(detect, "COMPARED", whole // 2)  # two images at a time, and one
    with Largest() as largest:
        got = task.loss(outputs, batch, 0.3)
    assert largest.elements <= whole // 2
    for name, value in want.terms.items():
        assert torch.equal(got.terms[name], value)


def test_suppression_is_within_a_class():
    """A rider and a horse are two objects, however much their boxes overlap."""
    distances, logits = torch.full((1, 84, 4), 3.0), torch.full((1, 84, CLASSES), -9.0)
    logits[0, 9, 1], logits[0, 10, 2] = 2.0, 1.0
    merging = build_task(DetectConfig(conf=0.1, nms=True, iou=0.5), CLASSES, YoloN())
    (found,) = merging.decode((distances, logits), batch_of(1))
    assert found.classes.tolist() == [1, 2]
