"""Every entry of EVALUATORS: what was predicted decides, not who predicted it or in what order."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from visiontrain.core.types import ClassScores, Detections
from visiontrain.data.build import whole_images
from visiontrain.data.table import Table
from visiontrain.metrics.registry import EVALUATORS

IMAGES, NAMES = 12, ("cat", "_dog", "no boxes")
BEST = {"detect": "map", "classify": "top1"}


class NoPixels:
    def __len__(self):
        return IMAGES

    def read(self, row):
        raise NotImplementedError

    def name(self, row):
        raise NotImplementedError


@pytest.fixture(params=sorted(EVALUATORS))
def kind(request):
    return request.param


@pytest.fixture
def table(kind):
    return boxed() if kind == "detect" else labelled()


def labelled():
    """Make images of one class each, none of the last."""
    sizes, classes = np.full((IMAGES, 2), 300, np.int32), np.arange(IMAGES) % 2
    return whole_images(NAMES, NoPixels(), sizes, classes, np.ones(IMAGES, np.int64))


def boxed():
    rng = np.random.default_rng(3)
    counts = rng.integers(0, 6, IMAGES)
    corner, side = rng.uniform(0, 150, (counts.sum(), 2)), rng.uniform(5, 150, (counts.sum(), 2))
    return Table(
        names=NAMES,
        images=NoPixels(),
        sizes=np.full((IMAGES, 2), 300, np.int32),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.hstack([corner, corner + side]).astype(np.float32),
        classes=rng.integers(0, 2, counts.sum()).astype(np.int32),
        crowd=rng.random(counts.sum()) < 0.1,
        difficult=rng.random(counts.sum()) < 0.1,
        area=side.prod(axis=1).astype(np.float32),
    )


@pytest.fixture
def predictions(kind, table):
    return detections(table) if kind == "detect" else scores()


def scores():
    """Make probabilities, some of which are equal."""
    rng = torch.Generator().manual_seed(5)
    rows = torch.randint(1, 5, (IMAGES, len(NAMES)), generator=rng).float()
    return [ClassScores(row / row.sum()) for row in rows]


def detections(table):
    """Make detections near the boxes, of which many have one score."""
    rng = torch.Generator().manual_seed(5)
    made = []
    for image in range(IMAGES):
        boxes = torch.from_numpy(table.boxes[table.rows(image)]).repeat(3, 1)
        boxes = boxes + torch.randn(boxes.shape, generator=rng) * 4
        scores = torch.randint(1, 5, (len(boxes),), generator=rng) / 4
        classes = torch.randint(0, len(NAMES), (len(boxes),), generator=rng)
        made.append(Detections(boxes, scores, classes))
    return made


def same(a, b):
    """Compare to the bit; nan equals nan."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def rows_of(kind, table, predictions, images):
    evaluator = EVALUATORS[kind](table)
    for image in images:
        evaluator.update([predictions[image]], torch.tensor([image]))
    return evaluator.rows()


def test_scores_do_not_depend_on_the_order_of_rows_nor_on_ranks(kind, table, predictions):
    evaluator = EVALUATORS[kind](table)
    evaluator.update(predictions, torch.arange(IMAGES))
    rows = evaluator.rows()
    assert rows.dtype == torch.float64
    whole = evaluator.compute(rows)
    assert 0 < whole[BEST[kind]] < 1
    for seed in range(5):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        assert same(evaluator.compute(rows[order]), whole)
    for world in (1, 2, 3):
        shards = [rows_of(kind, table, predictions, range(r, IMAGES, world)) for r in range(world)]
        assert same(evaluator.compute(torch.cat(shards)), whole)


def test_images_that_fill_a_place_add_nothing(kind, table, predictions):
    evaluator = EVALUATORS[kind](table)
    a, b, *_ = (n for n in range(IMAGES) if len(predictions[n].scores))
    evaluator.update([predictions[a], predictions[b]], torch.tensor([a, -1]))
    assert set(evaluator.rows()[:, 0].tolist()) == {a}
    assert len(EVALUATORS[kind](table).rows()) == 0


def test_metrics_are_numbers_by_name_and_by_class(kind, table, predictions):
    evaluator = EVALUATORS[kind](table)
    evaluator.update(predictions, torch.arange(IMAGES))
    metrics = evaluator.compute(evaluator.rows())
    classes = metrics.pop("per_class")
    assert all(isinstance(value, float) for value in metrics.values())
    assert list(classes) == list(NAMES)
    assert math.isnan(classes["no boxes"]["recall"])
    assert 0 < classes["cat"]["images"] <= IMAGES
