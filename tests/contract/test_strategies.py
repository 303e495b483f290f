"""Every registered mode: state in and out, failed steps, evaluation, talk, number formats."""

import functools
from dataclasses import replace
from itertools import islice

import cases
import pytest
import torch
from torch import nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Batch, Place
from visiontrain.data.collate import collate
from visiontrain.engine.step import train_step
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import Pipeline as PipelineConfig
from visiontrain.strategies.pipeline import Pipeline, fill, refuse_lost
from visiontrain.strategies.placement import Placement
from visiontrain.strategies.precision import START, Precision
from visiontrain.strategies.registry import STRATEGIES

# Nothing of these is in this process: tests/unit/test_servers.py, tests/unit/test_federated.py.
MODES = sorted(STRATEGIES.keys() - {"parameter_server", "federated"})
ADAMW = {"kind": "adamw", "clip": 8.0}
ALONE = {
    **dict.fromkeys(("single", "client"), Place(cases.CPU)),
    "placement": Place(cases.CPU, before=(cases.CPU,)),
}


def settings(kind, precision="fp32", **changes):
    return {"strategy": {"kind": kind}, "precision": precision, "optim": ADAMW} | changes


def learner_of(run):
    keys = run["strategy"]
    return cases.make_learner(ALONE.get(keys["kind"]) or cases.here(**keys), run)


def advance(learner, steps):
    """Train from where the learner stands; return the results."""
    first = learner.step
    todo = islice(cases.make_steps(learner.strategy), first, first + steps)
    return [train_step(learner, step.micro_batches, step.images) for step in todo]


def gap(one, other):
    """Return the largest difference between two collected states."""
    assert one.keys() == other.keys()
    for part in one:
        assert one[part].keys() == other[part].keys()
    return max(
        (one[part][name].double() - other[part][name].double()).abs().max().item()
        for part in one
        for name in one[part]
    )


def on_ranks(ranks, kind, fn, *args):
    """Call `fn` on two ranks, or here for the modes of one."""
    if kind in ALONE:
        return [fn(kind, *args)]
    return ranks(2).run(fn, kind, *args)


def test_images_that_only_fill_a_place_move_no_statistics():
    """As the smaller last batch of an epoch leaves them, cut into more parts than it has images."""
    run = settings("single", optim={"kind": "sgd", "clip": 8.0}, norm="batch")
    one, other = learner_of(run), learner_of(run)
    (step,) = islice(cases.make_steps(one.strategy, accumulate=1), 1)
    blank = collate([], cases.SIDE)
    train_step(one, step.micro_batches, step.images)
    train_step(other, [*step.micro_batches, blank, blank], step.images)
    assert gap(one.collect(), other.collect()) == 0


def test_a_pipeline_fills_with_real_pictures():
    images = torch.randint(0, 255, (2, 3, 8, 8), dtype=torch.uint8)
    short = replace(collate([], 8), images=torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    filled = fill(short, 2, images[:1])
    assert torch.equal(filled.images, images[:1].expand(2, -1, -1, -1))
    assert filled.valid.tolist() == [0, 0]


# -- state ----------------------------------------------------------------------------


@functools.cache
def control(steps):
    learner = learner_of(settings("single", "fp64"))
    advance(learner, steps)
    return learner.collect()


def resume(saved, resumed):
    """Train 2 steps in one mode, go on for 2 in another; return how far from one device."""
    first = learner_of(settings(saved, "fp64"))
    advance(first, 2)
    whole = first.collect()
    second = learner_of(settings(resumed, "fp64", seed=1))
    second.load(whole)
    second.step, second.samples = first.step, first.samples
    advance(second, 2)
    return gap(control(4), second.collect())


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("ddp", "single"),
        ("ddp", "fsdp"),
        ("ddp", "pipeline"),
        ("fsdp", "pipeline"),
        ("pipeline", "fsdp"),
        ("single", "ddp"),
    ],
)
def test_a_run_goes_on_in_another_mode(saved, resumed, ranks):
    assert max(ranks(2).run(resume, saved, resumed)) < 1e-9


# -- failed steps ---------------------------------------------------------------------


def poison(batch):
    return Batch(
        torch.full(batch.images.shape, torch.nan),
        batch.targets,
        batch.ids,
        batch.frame,
        batch.valid,
    )


def fail(kind, optim, precision):
    """Fail the second of three steps in the last process; say what it changed."""
    learner = learner_of(settings(kind, precision, norm="batch", optim={"kind": optim}))
    scales = [learner.strategy.precision.scale.item()]
    place = learner.strategy.place
    steps = list(islice(cases.make_steps(learner.strategy), 3))
    train_step(learner, steps[0].micro_batches, steps[0].images)
    before, bad = learner.collect(), steps[1].micro_batches
    if place.rank == place.world - 1 or kind == "pipeline":
        bad = [*bad[:-1], poison(bad[-1])]
    train_step(learner, bad, steps[1].images)
    after, failed = learner.collect(), learner.nonfinite.item()
    scales.append(learner.strategy.precision.scale.item())
    train_step(learner, steps[2].micro_batches, steps[2].images)
    scales.append(learner.strategy.precision.scale.item())
    changed = [
        name
        for part in before
        for name, tensor in before[part].items()
        if tensor.is_floating_point() and not torch.equal(tensor, after[part][name])
    ]
    return changed, failed, learner.nonfinite.item(), gap(after, learner.collect()), scales


@pytest.mark.parametrize(
    ("kind", "optim", "precision"),
    [
        *((kind, "adamw", precision) for kind in MODES for precision in ("fp32", "fp16")),
        *(("single", "sgd", "fp32"), ("fsdp", "sgd", "fp32")),  # on tensors, on shards of them
    ],
)
def test_a_failed_step_changes_no_bit_anywhere(kind, optim, precision, ranks):
    """But fp16's loss scale, which all processes halve though the gradient of one failed."""
    for changed, failed, healed, moved, scales in on_ranks(ranks, kind, fail, optim, precision):
        assert changed == []
        assert (failed, healed) == (1.0, 0.0)
        assert 0 < moved < torch.inf
        assert scales == ([START, START / 2, START / 2] if precision == "fp16" else [1.0] * 3)


# -- evaluation -----------------------------------------------------------------------


def score(kind):
    """Evaluate the average here and on one device; return outputs and the gap, if any.

    In fp64: which of two almost equal scores is the better one hangs on rounding.
    """
    learner = learner_of(settings(kind, "fp64", norm="batch"))
    advance(learner, 1)
    raw = learner.collect()
    batch = next(iter(cases.make_steps(Strategy(ALONE["single"], learner.strategy.precision))))
    batch = batch.micro_batches[0].to(cases.CPU, torch.float64)
    with learner.evaluating() as model, torch.no_grad():
        learner.strategy.sync_buffers(model)
        got = learner.strategy.forward(model, batch)
    with pytest.raises(ZeroDivisionError), learner.evaluating():
        raise ZeroDivisionError
    assert learner.model.training
    assert gap(raw, learner.collect()) == 0
    alone = learner_of(settings("single", "fp64", norm="batch"))
    alone.load(raw)
    with alone.evaluating() as model, torch.no_grad():
        want = alone.strategy.forward(model, batch)
    if got is None:
        return None
    assert len(got) == len(want) == 2
    gaps = [(a - b).abs().max().item() for a, b in zip(got, want, strict=True)]
    return got[1].double().sum().item(), max(gaps)


@pytest.mark.parametrize("kind", MODES)
def test_evaluation_is_one_devices_and_leaves_no_trace(kind, ranks):
    scored = on_ranks(ranks, kind, score)
    holders = [pair for pair in scored if pair is not None]
    assert len(holders) == (1 if kind == "pipeline" else len(scored))
    assert len({total for total, _ in holders}) == 1
    assert holders[0][1] < 1e-9  # only the main rank's average is the one that is saved


# -- talk -----------------------------------------------------------------------------


def talk(kind):
    strategy = learner_of(settings(kind)).strategy
    place = strategy.place
    rows = torch.full((place.rank + 1, 2), float(place.rank))
    return (
        place.world,
        strategy.sum(torch.tensor([1.0, 2.0])).tolist(),
        strategy.any(flag=place.rank == place.world - 1),
        strategy.any(flag=False),
        strategy.broadcast({"text": "ü", "rank": place.rank}),
        strategy.gather(rows).tolist(),
        strategy.gather(torch.empty(0, 3)).shape,
    )


@pytest.mark.parametrize("kind", MODES)
def test_every_process_hears_the_same(kind, ranks):
    for world, total, some, none, word, rows, empty in on_ranks(ranks, kind, talk):
        assert total == [world, 2.0 * world]
        assert (some, none) == (True, False)
        assert word == {"text": "ü", "rank": 0}
        assert rows == [[float(r)] * 2 for r in range(world) for _ in range(r + 1)]
        assert empty == (0, 3)


# -- number formats, cuts, frozen blocks ----------------------------------------------


def results(kind, changes, count=2):
    """Return terms and gradient norm of some steps, and the bytes sent."""
    run = settings(kind) | changes
    learner = learner_of(run | {"strategy": {"kind": kind} | changes.get("strategy", {})})
    steps = advance(learner, count)
    numbers = [{k: v.item() for k, v in s.terms.items()} for s in steps]
    norms = [s.grad_norm.item() for s in steps]
    return numbers, norms, learner.strategy.bytes_sent


def assert_close(got, want, tolerance):
    for (terms, norms, _), (other_terms, other_norms, _) in zip(
        got, [want] * len(got), strict=True
    ):
        assert norms == pytest.approx(other_norms, rel=tolerance)
        for a, b in zip(terms, other_terms, strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", MODES)
def test_half_precision_leaves_gradients_in_true_units(kind, precision, ranks):
    got = on_ranks(ranks, kind, results, {"precision": precision})
    assert_close(got, results("single", {}), 0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"schedule": "1f1b"}},
        *(
            {"strategy": {"schedule": schedule}} | more
            for schedule in ("interleaved_1f1b", "zero_bubble", "zbv")
            for more in ({}, {"freeze": 5})
        ),
        {"strategy": {"stages": ["head"]}},
        {"strategy": {"stages": ["up4"]}, "freeze": 5},  # nothing trains in the first stage
        {"freeze": 2},
    ],
)
def test_pipeline_under_other_settings(changes, ranks):
    if changes.get("strategy", {}).get("schedule") == "zbv" and torch.__version__ < "2.12":
        pytest.skip("refused there")
    got = ranks(2).run(results, "pipeline", {"precision": "fp64"} | changes)
    alone = {name: value for name, value in changes.items() if name != "strategy"}
    assert_close(got, results("single", {"precision": "fp64"} | alone), 1e-9)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_frozen_blocks_are_left_alone_by_sharding(kind, ranks):
    changes = {"precision": "fp64", "freeze": 3}
    assert_close(ranks(2).run(results, kind, changes), results("single", changes), 1e-9)


@pytest.mark.parametrize("kind", MODES)
def test_bytes_sent_are_counted(kind, ranks):
    weights = sum(p.nbytes for p in learner_of(settings("single")).model.parameters())
    gathers = 2 * cases.ACCUMULATE
    want = dict.fromkeys(ALONE, 0) | {
        "ddp": 2 * weights,
        "fsdp": 2 * (gathers + 1) * (weights // 2),
    }
    for _, _, sent in on_ranks(ranks, kind, results, {}):
        assert sent == want[kind] if kind in want else sent > 0


def test_a_parameter_that_got_no_gradient_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0](torch.ones(1, 2)).sum().backward()
    model[1].bias.requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match=r"^strategy\.schedule: zbv; 1\.weight depends on "):
        refuse_lost(model, "zbv")
    model[1].weight.requires_grad_(requires_grad=False)
    refuse_lost(model, "zbv")


def test_placed_blocks_take_their_inputs_to_where_they_lie():
    place = Place(torch.device("meta"), before=(cases.CPU,))
    model = build_model(YoloN(), 10)
    names = list(model.blocks)
    strategy = Placement(place, Precision("fp32", cases.CPU), [names[2]])
    strategy.setup(model)
    lies = [{p.device.type for p in model.blocks[name].parameters()} for name in names]
    assert lies[:2] == [{"cpu"}] * 2
    assert set().union(*lies[2:]) == {"meta"}
    outputs = model(torch.rand(2, 3, 64, 64))
    assert {value.device.type for value in outputs} == {"meta"}
    with pytest.raises(ConfigError, match="no block 'nowhere'"):
        Placement(place, strategy.precision, ["nowhere"]).setup(build_model(YoloN(), 10))


def test_synchronised_batch_norm_is_refused_where_it_cannot_work():
    with pytest.raises(ConfigError, match=r"^model\.norm: sync on the CPU; "):
        learner_of(settings("single", norm="sync"))
    place = Place(torch.device("meta"), 0, 2)
    strategy = Pipeline(place, Precision("fp32", torch.device("cpu")), PipelineConfig())
    with pytest.raises(ConfigError, match=r"^model\.norm: sync in a pipeline"):
        strategy.setup(nn.Sequential(nn.SyncBatchNorm(2)))


# -- models that need the targets in training -----------------------------------------


def foreign(kind):
    """Describe a model of torchvision's whose ResNet is frozen: the tests take a third."""
    return {"precision": "fp64", "model": {"kind": kind, "trainable_layers": 0}}


@pytest.mark.parametrize(("kind", "mode"), [("fcos", "ddp"), ("retinanet", "fsdp")])
def test_losses_of_torchvision_add_up_over_ranks(kind, mode, ranks):
    got = ranks(2).run(results, mode, foreign(kind), 1)
    assert_close(got, results("single", foreign(kind), 1), 1e-9)


def test_a_model_that_draws_at_random_is_near_one_device(ranks):
    got = ranks(2).run(results, "ddp", foreign("faster_rcnn"))
    assert got[0][:2] == got[1][:2]
    terms, want = got[0][0][0], results("single", foreign("faster_rcnn"), 1)[0][0]
    assert terms == pytest.approx(want, rel=0.2, abs=0.05)
