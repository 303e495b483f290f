"""What FSDP can be told: number formats of what travels, and memory of the CPU."""

from itertools import islice

import cases
import pytest
import torch
from test_strategies import advance, gap, learner_of, poison, results, settings
from timm.layers import BatchNormAct2d, LayerNorm2d
from torch import nn

from visiontrain.core.errors import ConfigError
from visiontrain.engine.step import train_step
from visiontrain.strategies.config import FSDP
from visiontrain.strategies.devices import settle
from visiontrain.strategies.fsdp import read_norms_wide


def sizes():
    """Return the numbers in the model, and in what trains of it with three blocks frozen."""
    model = learner_of(settings("single", freeze=3)).model
    every = [sum(p.numel() for p in block.parameters()) for block in model.blocks.values()]
    return sum(every), sum(every[3:])


@pytest.mark.parametrize(
    ("precision", "reduce", "freeze", "weight", "gradient"),
    [("fp32", "bf16", 0, 4, 2), ("bf16", "full", 0, 2, 4), ("fp16", "bf16", 3, 2, 2)],
)
def test_bytes_are_those_of_the_formats_that_travel(
    ranks, precision, reduce, freeze, weight, gradient
):
    changes = {"precision": precision, "freeze": freeze, "strategy": {"reduce": reduce}}
    every, trained = sizes()
    trained = trained if freeze else every
    gathered = cases.ACCUMULATE * (every + trained) * weight
    for _, _, sent in ranks(2).run(results, "fsdp", changes):
        assert sent == 2 * ((gathered + trained * gradient) // 2)


def first_gradient(kind, precision, changes):
    """Return the whole gradient of the first step, as the optimizer gets it."""
    learner = learner_of(settings(kind, precision, strategy={"kind": kind, **changes}))
    (step,) = islice(cases.make_steps(learner.strategy), 1)
    learner.begin()
    learner.strategy.forward_backward(learner, step.micro_batches)
    named = {n: p.grad for n, p in learner.model.named_parameters()}
    return learner.strategy.collect(named)


def distance(one, other):
    """Return how far apart two gradients are, as a share of the second's length."""
    apart = sum((one[n] - other[n]).square().sum() for n in other).sqrt()
    return (apart / sum(g.square().sum() for g in other.values()).sqrt()).item()


def test_formats_of_what_travels_cost_less_than_those_of_products(ranks):
    """Under bf16 products take weights in bf16 anyway: when they become so hardly matters."""
    pool = ranks(2)
    exact = first_gradient("single", "fp64", {})
    ddp = pool.run(first_gradient, "ddp", "bf16", {})[0]
    fsdp = pool.run(first_gradient, "fsdp", "bf16", {})[0]
    assert distance(fsdp, ddp) < 0.1 * distance(ddp, exact)  # 0.004, 0.115
    reduced = pool.run(first_gradient, "fsdp", "fp32", {"reduce": "bf16"})[0]
    assert 1e-4 < distance(reduced, exact) < 0.01  # 0.003; in fp32 it is 6e-6


def overflow(_):
    """Fail a step under fp16 in the last process; return what it changed, and the scale."""
    learner = learner_of(settings("fsdp", "fp16"))
    place, scale = learner.strategy.place, learner.strategy.precision.scale
    (step,) = islice(cases.make_steps(learner.strategy), 1)
    before, bad = learner.collect(), step.micro_batches
    if place.rank == place.world - 1:
        bad = [poison(batch) for batch in bad]
    train_step(learner, bad, step.images)
    return gap(before, learner.collect()), scale.item(), learner.nonfinite.item()


def test_an_overflow_anywhere_lowers_the_scale_everywhere(ranks):
    assert ranks(2).run(overflow, None) == [(0.0, 64.0, 1.0)] * 2


def offloaded(_):
    """Train as if parameters were offloaded; return how far from training without."""
    states = []
    for offload in (False, True):
        learner = learner_of(settings("fsdp", strategy={"kind": "fsdp", "offload": offload}))
        advance(learner, 2)
        states.append(learner.collect())
    return gap(*states)


def test_offloaded_parameters_train_the_same(ranks):
    """On a CPU, where it moves nothing: that the parts of FSDP and ours fit together."""
    assert ranks(2).run(offloaded, None) == [0.0] * 2


def test_offloading_from_a_cpu_to_itself_is_refused():
    with pytest.raises(ConfigError, match=r"^strategy\.offload: true on the CPU"):
        settle(FSDP(offload=True), "cpu")


NORMS = (
    nn.BatchNorm2d(4),
    BatchNormAct2d(4),
    nn.GroupNorm(2, 4),
    LayerNorm2d(4),
    nn.LayerNorm((4, 3, 3), elementwise_affine=False),
)


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_norms_compute_in_full_whatever_their_parameters_travel_in(norm):
    model, images = nn.Sequential(norm), torch.randn(2, 4, 3, 3, requires_grad=True)
    names, want = list(model.state_dict()), model(images.bfloat16().float())
    read_norms_wide(model)
    for name, parameter in list(norm.named_parameters()):
        norm._parameters[name] = nn.Parameter(parameter.detach().bfloat16())
    got = model(images.bfloat16())
    got.sum().backward()
    assert list(model.state_dict()) == names
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert torch.allclose(got.float(), want, atol=0.02)
