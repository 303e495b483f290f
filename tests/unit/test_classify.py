"""The loss of classification against torch's own, however a batch is cut."""

from dataclasses import replace

import pytest
import torch
from cases import CPU, make_learner
from torch.nn import functional

from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Batch, Place
from visiontrain.models.config import ResNetTiny
from visiontrain.recipe import Run
from visiontrain.tasks.classify import HEAD, TERM
from visiontrain.tasks.config import ClassifyConfig
from visiontrain.tasks.registry import build_task

CLASSES, WEIGHTS = 5, [0.5, 2.0, 1.0, 3.0, 0.1]


def task(**keys):
    return build_task(ClassifyConfig(**keys), CLASSES, ResNetTiny())


def batch(rows, valid=None):
    """Make a batch of (class, weight) pairs for each image."""
    targets = torch.zeros(len(rows), max(map(len, rows)), 6, dtype=torch.float64)
    targets[..., 0] = -1
    for target, pairs in zip(targets, rows, strict=True):
        for k, (label, weight) in enumerate(pairs):
            target[k, 0], target[k, 5] = label, weight
    count = len(rows)
    return Batch(
        torch.zeros(count, 3, 8, 8),
        targets,
        torch.arange(count),
        torch.zeros(count, 5),
        torch.ones(count) if valid is None else valid,
    )


def mean(loss):
    return loss.terms[TERM] / loss.counts[HEAD]


@pytest.fixture
def logits():
    return torch.randn(6, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_class_each_is_torchs_cross_entropy(logits, smoothing):
    labels = torch.tensor([0, 3, 2, 2, 4, 1])
    got = task(smoothing=smoothing).loss(logits, batch([[(k, 1.0)] for k in labels.tolist()]), 0.0)
    want = functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    torch.testing.assert_close(mean(got), want, rtol=1e-12, atol=0)


def test_weighted_classes_are_torchs(logits):
    labels = torch.tensor([0, 3, 2, 2, 4, 1])
    some = task(smoothing=0.0, class_weights=WEIGHTS)
    got = some.loss(logits, batch([[(k, 1.0)] for k in labels.tolist()]), 0.0)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    torch.testing.assert_close(mean(got), functional.cross_entropy(logits, labels, weight))


def test_smoothed_weighted_classes_are_torchs(logits):
    labels = torch.tensor([0, 3, 2, 2, 4, 1])
    some = task(smoothing=0.1, class_weights=WEIGHTS)
    got = some.loss(logits, batch([[(k, 1.0)] for k in labels.tolist()]), 0.0)
    weight = torch.tensor(WEIGHTS, dtype=torch.float64)
    want = functional.cross_entropy(logits, labels, weight, label_smoothing=0.1)
    torch.testing.assert_close(mean(got), want)


def normalised(weights):
    """Return a batch's mean loss and gradients as a mode makes them of sums and counts."""
    run = {"strategy": {"kind": "single"}, "precision": "fp32", "optim": {}}
    task = {"kind": "classify", "class_weights": weights}
    learner = make_learner(Place(CPU), run | {"task": task, "model": {"kind": "resnet_tiny"}})
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    some = replace(batch([[(label, 1.0)] for label in (0, 3, 3)]), images=pictures)
    loss = learner.strategy.forward_backward(learner, [some])
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    return loss.terms[TERM], gradients


def test_only_ratios_of_weights_count_however_small_they_are():
    """A mode divides by 1 at least."""
    wanted, gradients = normalised([1.0] * 10)
    found, others = normalised([0.001] * 10)
    assert torch.equal(found, wanted)
    assert wanted > 1
    assert all(map(torch.equal, others, gradients))
    wanted, gradients = normalised([1.0, *[4.0] * 8, 0.0])
    found, others = normalised([0.001, *[0.004] * 8, 0.0])
    torch.testing.assert_close([found, *others], [wanted, *gradients])


def test_mixed_classes_are_torchs_soft_targets(logits):
    rows = [[(0, 0.3), (3, 0.7)], [(1, 1.0)], [(2, 0.5), (2, 0.5)], *[[(4, 1.0)]] * 3]
    soft = torch.zeros(6, CLASSES, dtype=torch.float64)
    for row, pairs in zip(soft, rows, strict=True):
        for label, weight in pairs:
            row[label] += weight
    got = task(smoothing=0.2).loss(logits, batch(rows), 0.0)
    want = functional.cross_entropy(logits, soft, label_smoothing=0.2)
    torch.testing.assert_close(mean(got), want)


def test_several_classes_are_binary_decisions(logits):
    rows = [[(0, 1.0), (3, 1.0)], [], [(2, 1.0)], [(4, 1.0)], [(1, 1.0)], []]
    wanted = torch.zeros(6, CLASSES, dtype=torch.float64)
    for row, pairs in zip(wanted, rows, strict=True):
        for label, _ in pairs:
            row[label] = 1
    got = task(several=True, smoothing=0.0).loss(logits, batch(rows), 0.0)
    want = functional.binary_cross_entropy_with_logits(logits, wanted)
    torch.testing.assert_close(mean(got), want)
    weighted = task(several=True, smoothing=0.2, class_weights=WEIGHTS)
    got, weight = weighted.loss(logits, batch(rows), 0.0), torch.tensor(WEIGHTS).double()
    want = functional.binary_cross_entropy_with_logits(logits, wanted * 0.8 + 0.1, weight)
    torch.testing.assert_close(mean(got), want)


def test_mixed_images_of_several_classes_have_each_by_its_share_and_no_more_than_once(logits):
    """What both have is there whole; the rest by how much of its image is seen."""
    rows = [[(0, 0.7), (1, 0.7), (1, 0.3)], [(2, 1.0)], [(3, 0.75), (3, 0.75)], [], [], []]
    wanted = torch.zeros(6, CLASSES, dtype=torch.float64)
    wanted[0, :2], wanted[1, 2], wanted[2, 3] = torch.tensor([0.7, 1.0]), 1, 1
    got = task(several=True, smoothing=0.0).loss(logits, batch(rows), 0.0)
    want = functional.binary_cross_entropy_with_logits(logits, wanted)
    torch.testing.assert_close(mean(got), want)


@pytest.mark.parametrize("several", [False, True])
def test_sums_add_up_over_any_cut_and_fillers_add_nothing(logits, several):
    some = task(several=several, class_weights=WEIGHTS)
    whole = some.loss(logits, batch([[(k % CLASSES, 1.0)] for k in range(6)]), 0.0)
    valid = torch.tensor([1.0, 1.0, 0.0, 1.0])
    first = some.loss(logits[[0, 1, 5, 2]], batch([[(k, 1.0)] for k in (0, 1, 2, 2)], valid), 0.0)
    rest = some.loss(logits[3:], batch([[(k % CLASSES, 1.0)] for k in (3, 4, 5)]), 0.0)
    torch.testing.assert_close(first.terms[TERM] + rest.terms[TERM], whole.terms[TERM])
    torch.testing.assert_close(first.counts[HEAD] + rest.counts[HEAD], whole.counts[HEAD])


def test_probabilities_are_of_all_classes_or_of_each(logits):
    one, each = (task(several=s).decode(logits, batch([[]] * 6)) for s in (False, True))
    assert sum(one[0].scores.tolist()) == pytest.approx(1)
    torch.testing.assert_close(each[2].scores, logits[2].float().sigmoid())
    assert one[1].top(2)[0] == (
        str(int(logits[1].argmax())),
        pytest.approx(float(one[1].scores.max())),
    )


@pytest.mark.parametrize("weights", [[1.0, -1.0], [0.0, 0.0], [], [1.0, float("nan")]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match=r"^task\.class_weights: .*; (give numbers|.* finite)"):
        build(Run, {"task": {"kind": "classify", "class_weights": weights}})


def test_weights_of_other_classes_are_refused():
    with pytest.raises(ConfigError, match=r"class_weights: 2 of them for 5 classes; give"):
        task(class_weights=[1.0, 2.0])
