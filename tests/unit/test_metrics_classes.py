"""Scores of classifiers against what can be counted by hand."""

import math

import numpy as np
import pytest
import torch
from memory import MemoryImages

from visiontrain.core.errors import DivergedError
from visiontrain.core.types import ClassScores
from visiontrain.data.build import whole_images
from visiontrain.metrics.classification import average_precision, build_evaluator, calibration_error

NAMES = tuple("abcdefg")
RNG = np.random.default_rng(0)


def table(labels, *, several=False):
    """Return a table of images with these classes each."""
    images = MemoryImages([np.zeros((8, 8, 3), np.uint8)] * len(labels))
    return whole_images(
        NAMES,
        images,
        np.full((len(labels), 2), 8, np.int32),
        np.array([k for own in labels for k in own], np.int64),
        np.array([len(own) for own in labels]),
        several=several,
    )


def scored(labels, scores, *, several=False):
    evaluator = build_evaluator(table(labels, several=several))
    found = [ClassScores(torch.tensor(row)) for row in scores]
    evaluator.update(found[:2], torch.arange(2))
    evaluator.update(found[2:], torch.arange(2, len(found)))
    rows = evaluator.rows()
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
    twice = torch.cat([shuffled, shuffled[:2]])
    metrics = evaluator.compute(twice)
    assert repr(metrics) == repr(evaluator.compute(rows))
    return metrics


def test_each_number_is_what_counting_gives():
    labels = RNG.integers(0, 6, 40)  # never class g
    scores = RNG.dirichlet(np.ones(7) * 0.5, 40)
    metrics = scored([[k] for k in labels.tolist()], scores.tolist())
    order = np.argsort(-scores, axis=1)
    assert metrics["top1"] == pytest.approx(np.mean(order[:, 0] == labels))
    assert metrics["top5"] == pytest.approx(np.mean((order[:, :5] == labels[:, None]).any(1)))
    assert metrics["loss"] == pytest.approx(-np.log(scores[range(40), labels]).mean())
    recalls = [np.mean(order[labels == k, 0] == k) for k in range(6)]
    assert metrics["balanced"] == pytest.approx(np.mean(recalls))
    one = metrics["per_class"]["c"]
    assert one["recall"] == pytest.approx(recalls[2])
    assert one["images"] == (labels == 2).sum()
    assert one["precision"] == pytest.approx(np.mean(labels[order[:, 0] == 2] == 2))
    assert math.isnan(metrics["per_class"]["g"]["recall"])


def test_calibration_error_of_known_bins():
    sure = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False, True, False])
    assert calibration_error(sure, right) == pytest.approx((4 * 0.2 + 2 * 0.05) / 6)
    assert calibration_error(np.array([1.0]), np.array([True])) == 0


def test_average_precision_by_its_definition_whatever_the_order_of_equal_scores():
    scores = RNG.integers(0, 8, 60) / 8
    wanted = RNG.random(60) < 0.3
    thresholds = sorted(set(scores.tolist()), reverse=True)
    want, before = 0.0, 0.0
    for threshold in thresholds:
        said = scores >= threshold
        recall = (said & wanted).sum() / wanted.sum()
        want += (recall - before) * (said & wanted).sum() / said.sum()
        before = recall
    assert average_precision(scores, wanted) == pytest.approx(want)
    order = RNG.permutation(60)
    assert average_precision(scores[order], wanted[order]) == average_precision(scores, wanted)
    assert math.isnan(average_precision(scores, np.zeros(60, np.bool_)))


def test_several_classes_are_each_decided():
    labels = [[0, 1], [], [1], [2], [0]]
    scores = RNG.random((5, 7))
    metrics = scored(labels, scores.tolist(), several=True)
    wanted = np.array([[k in own for k in range(7)] for own in labels])
    each = [average_precision(scores[:, k], wanted[:, k]) for k in range(3)]
    assert metrics["map"] == pytest.approx(np.mean(each))
    said = scores >= 0.5
    assert metrics["precision"] == pytest.approx((said & wanted).sum() / said.sum())
    assert metrics["recall"] == pytest.approx((said & wanted).sum() / wanted.sum())


@pytest.mark.parametrize("several", [False, True])
def test_a_score_that_is_not_finite_is_said(several):
    with pytest.raises(DivergedError, match="not finite"):
        scored([[0]] * 4, [[0.2] * 7] * 3 + [[math.nan] * 7], several=several)


def test_calibration_f1_and_the_loss_of_labels_are_what_counting_gives():
    random = np.random.default_rng(1)
    labels, scores = random.integers(0, 7, 40), random.dirichlet(np.ones(7), 40)
    metrics = scored([[k] for k in labels.tolist()], scores.tolist())
    said, sure = scores.argmax(1), scores.max(1)
    right = said == labels
    bins = [(sure * 15).astype(int) == k for k in range(15)]
    gaps = [abs((sure - right)[own].sum()) for own in bins]
    assert metrics["ece"] == pytest.approx(sum(gaps) / 40)
    for k, name in enumerate(NAMES):
        both = (labels == k).sum() + (said == k).sum()
        want = 2 * (right & (labels == k)).sum() / both
        assert metrics["per_class"][name]["f1"] == pytest.approx(want)
    scores, own = random.random((5, 7)), [[0, 1], [], [1], [2], [0]]
    metrics = scored(own, scores.tolist(), several=True)
    wanted = np.array([[k in some for k in range(7)] for some in own])
    said = scores >= 0.5
    f1 = 2 * (said & wanted).sum() / (said.sum() + wanted.sum())
    assert metrics["f1"] == pytest.approx(f1)
    loss = -np.where(wanted, np.log(scores), np.log1p(-scores)).mean()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
