import json

import pytest
import torch
import torch.distributed as dist
from small import config, prepared

from visiontrain import app
from visiontrain.core.types import Place
from visiontrain.data.dataset import EvalSet
from visiontrain.data.loader import collate
from visiontrain.data.open import open_dataset
from visiontrain.engine.learner import Learner, start_average
from visiontrain.prepare import prepare

IMAGES = 10  # in batches of 4: three, the last one of 2
PAIRS = 500  # of anchor and class, the best of each image
KEYS = {"data.val_images": IMAGES, "imgsz": 128, "task.conf": 0.0, "task.max_det": PAIRS}


@torch.no_grad()
def stir(model, run):
    """Make a fresh model answer differently to every image, as a trained one does."""
    scenes = EvalSet(open_dataset(run.data).table("val"), run.imgsz)
    batch = collate([scenes[row] for row in range(4)], run.imgsz).to(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.blocks["head"].parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model(batch.images)  # leaves statistics behind


def scored(run):
    """Score a fresh model as one of all ranks; return metrics as text and the rows, sorted."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = Place(torch.device("cpu"), rank, world, (rank, world), is_main=rank == 0)
    trainer = app.build(run, place)
    learner = trainer.learner
    stir(learner.model, run)
    learner.ema = start_average(learner.model, torch.float32)
    for name, average in learner.ema.items():
        if name.endswith("running_mean"):
            average.add_(0.01 * rank)  # what every rank's own share of the data leaves there
    evaluation = trainer.parts.evaluate(lambda: False)
    rows = sorted(map(tuple, evaluation.rows.tolist()))
    return json.dumps(evaluation.metrics), rows


@pytest.mark.parametrize("world", [2, 3])
def test_scores_are_equal_to_the_bit_for_any_world_size(ranks, tmp_path, world):
    one = scored(prepare(config(tmp_path / "one", **KEYS)))
    mode = {"kind": "ddp", "processes": world}
    run = prepare(config(tmp_path / "many", strategy=mode, **KEYS))
    results = ranks(world).run(scored, run)
    assert all(result == one for result in results)
    assert len(one[1]) == IMAGES * PAIRS
    scores = {image: [row[5] for row in one[1] if row[0] == image] for image in range(IMAGES)}
    assert len(set(map(tuple, scores.values()))) == IMAGES  # the images are told apart


def test_the_average_is_scored_and_training_goes_on_from_where_it_was(tmp_path):
    run, fitter = prepared(tmp_path, **KEYS)
    learner: Learner = fitter.learner
    stir(learner.model, run)
    for tensor in learner.ema.values():
        tensor.add_(0.5)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    averaged = fitter.parts.evaluate(lambda: False)
    assert learner.model.training
    after = learner.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    learner.ema = None
    assert not torch.equal(averaged.rows, fitter.parts.evaluate(lambda: False).rows)
