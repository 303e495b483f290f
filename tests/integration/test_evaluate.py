import json

import pytest
import torch
import torch.distributed as dist
from small import config, prepared

from visiontrain import app
from visiontrain.core.types import Place
from visiontrain.data.collate import collate
from visiontrain.data.dataset import EvalSet
from visiontrain.data.open import open_dataset
from visiontrain.engine.learner import Learner, start_average
from visiontrain.engine.weights import WeightsMeta, save_weights
from visiontrain.prepare import folder_of, prepare
from visiontrain.scoring import prepare_validation

IMAGES = 10  # in batches of 4: three, the last one of 2
PAIRS = 100  # of anchor and class, the best of each image
KEYS = {"imgsz": 64, "task.conf": 0.0, "task.max_det": PAIRS}


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


def place_of(run):
    """Return the place of this process among all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    shard = (0, 1) if run.strategy.kind == "pipeline" else (rank, world)
    return Place(torch.device("cpu"), rank, world, shard, is_main=rank == 0)


def scored(run):
    """Score a fresh model as one of all ranks; return metrics as text and the rows."""
    place = place_of(run)
    trainer = app.build(run, place)
    learner = trainer.learner
    stir(learner.model, run)
    learner.ema = start_average(learner.model, torch.float32)
    for name, average in learner.ema.items():
        if name.endswith("running_mean"):
            average.add_(0.01 * place.rank)  # what every rank's own share of the data leaves there
    evaluation = trainer.parts.evaluate(lambda: False)
    return json.dumps(evaluation.metrics), evaluation.rows.tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_scores_are_equal_to_the_bit_for_any_world_size(ranks, tmp_path, world):
    keys = {"data.val_images": IMAGES, **KEYS}
    one = scored(prepare(config(tmp_path / "one", **keys)))
    mode = {"kind": "ddp", "processes": world}
    run = prepare(config(tmp_path / "many", strategy=mode, **keys))
    results = ranks(world).run(scored, run)
    assert all(result == one for result in results)
    assert len(one[1]) == IMAGES * PAIRS
    scores = {image: [row[5] for row in one[1] if row[0] == image] for image in range(IMAGES)}
    assert len(set(map(tuple, scores.values()))) == IMAGES  # the images are told apart


OF_THE_MODE = (
    *("strategy", "processes", "peak_rss_mb", "peaks_rss_mb", "threads", "config_sha256"),
)


def validated(run):
    """Be one process of `visiontrain val`."""
    return app.score(run, place_of(run))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights that answer differently to every image."""
    folder = tmp_path_factory.mktemp("weights")
    run, fitter = prepared(folder / "run")
    stir(fitter.learner.model, run)
    names = open_dataset(run.data).names
    meta = WeightsMeta("detect", run.model.model_dump(), names, KEYS["imgsz"])
    path = folder / "some.safetensors"
    save_weights(path, meta, dict(fitter.learner.model.state_dict()))
    return path


@pytest.mark.parametrize("images", [2, IMAGES])
def test_validation_leaves_the_same_files_in_any_mode(images, ranks, tmp_path, weights):
    """Also where most processes have no image at all."""

    def left(kind, world):
        keys = {"data.val_images": images, "save_json": True, "weights": weights, **KEYS}
        if kind != "single":
            keys["strategy"] = {"kind": kind, "processes": world}
        run = prepare_validation(config(tmp_path / f"{kind}-{world}", **keys))
        assert {0} == {*(ranks(world).run(validated, run) if world > 1 else [validated(run)])}
        metrics = json.loads(folder_of(run).metrics.read_text())
        assert metrics["processes"] == world
        plain = {key: value for key, value in metrics.items() if key not in OF_THE_MODE}
        return plain, (folder_of(run).path / "detections.json").read_bytes()

    one = left("single", 1)
    assert one[0]["images"] == images
    assert one[1].count(b"image_id") == images * PAIRS
    others = (("ddp", 2), ("pipeline", 2)) if images == IMAGES else ()
    for kind, world in (("ddp", 3), ("fsdp", 3), *others):
        assert left(kind, world) == one


def test_the_average_is_scored_and_training_goes_on_from_where_it_was(tmp_path):
    run, fitter = prepared(tmp_path, **KEYS)
    learner: Learner = fitter.learner
    stir(learner.model, run)
    for tensor in learner.ema.values():
        tensor.copy_(tensor * 1.1)
    before = {name: t.clone() for name, t in learner.model.state_dict().items()}
    averaged = fitter.parts.evaluate(lambda: False)
    assert learner.model.training
    after = learner.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    learner.ema = None
    assert not torch.equal(averaged.rows, fitter.parts.evaluate(lambda: False).rows)
