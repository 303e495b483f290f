"""The learner: the average, swapping it in and out, state that goes out and in, clipping."""

import cases
import pytest
import torch

from visiontrain.core.types import Place
from visiontrain.engine.learner import approach, averaged
from visiontrain.engine.step import train_step
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.precision import Precision

RUN = {"strategy": {"kind": "single"}, "precision": "fp64", "optim": {"kind": "sgd", "clip": 8.0}}


@pytest.fixture
def learner():
    return cases.make_learner(Place(cases.CPU), RUN | {"norm": "batch"})


def batches(learner, count):
    steps = cases.make_steps(learner.strategy)
    return [next(steps) for _ in range(count)]


def train(learner, steps):
    return [train_step(learner, step.micro_batches, step.images) for step in steps]


def floats(learner):
    return {name: tensor.clone() for name, tensor in averaged(learner.model).items()}


def test_the_average_follows_its_formula(learner):
    window = learner.schedule.config.ema_window
    want, seen = floats(learner), 0
    for step in batches(learner, 3):
        train(learner, [step])
        decay = 1 - cases.BATCH / (cases.BATCH + window * seen)
        now = floats(learner)
        want = {name: decay * want[name] + (1 - decay) * now[name] for name in want}
        seen += step.images
    assert (learner.step, learner.samples) == (3, seen)
    assert learner.ema.keys() == want.keys()
    assert any(name.endswith("running_mean") for name in want)
    for name, tensor in want.items():
        # The share is rounded to fp32, as the flag of failed steps is.
        torch.testing.assert_close(learner.ema[name], tensor, rtol=1e-7, atol=1e-8)


def test_evaluating_swaps_the_average_in_and_back_also_after_an_error(learner):
    train(learner, batches(learner, 2))
    raw = floats(learner)
    with pytest.raises(ZeroDivisionError), learner.evaluating() as model:
        assert not model.training
        inside = floats(learner)
        raise ZeroDivisionError
    assert all(torch.equal(inside[name], learner.ema[name]) for name in inside)
    assert any(not torch.equal(inside[name], raw[name]) for name in inside)
    after = floats(learner)
    assert all(torch.equal(after[name], raw[name]) for name in raw)
    assert learner.model.training


def test_state_that_goes_out_comes_back_in(learner):
    steps = batches(learner, 4)
    train(learner, steps[:2])
    whole, where = learner.collect(), (learner.step, learner.samples)
    train(learner, steps[2:])
    want = learner.collect()
    other = cases.make_learner(Place(cases.CPU), RUN | {"norm": "batch"})
    other.load(whole)
    other.step, other.samples = where
    train(other, steps[2:])
    got = other.collect()
    assert all(torch.equal(got[p][name], want[p][name]) for p in want for name in want[p])


def test_clipping_scales_to_the_largest_norm_and_reports_the_whole():
    strategy = Strategy(Place(cases.CPU), Precision("fp32", cases.CPU))
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    model.bias.grad = torch.tensor([0.0, 12.0])
    assert strategy.clip_grad_norm(model, 26.0).item() == 13.0
    assert model.bias.grad.tolist() == [0.0, 12.0]
    assert strategy.clip_grad_norm(model, 6.5).item() == 13.0
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.0, 6.0]))
    torch.testing.assert_close(model.weight.grad, torch.tensor([[1.5, 0.0], [0.0, 2.0]]))


def test_cutting_a_batch_does_not_change_the_step():
    """Sums travel: whole, halves and single images give the same gradient in fp64."""
    traces = []
    for accumulate in (1, 2, 7):
        learner = cases.make_learner(Place(cases.CPU), RUN)
        step = next(cases.make_steps(learner.strategy, accumulate=accumulate))
        (result,) = train(learner, [step])
        gradient = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
        traces.append((result.terms, gradient))
    for terms, gradient in traces[1:]:
        assert terms.keys() == traces[0][0].keys()
        for name, value in terms.items():
            torch.testing.assert_close(value, traces[0][0][name], rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, traces[0][1], rtol=0, atol=1e-12)


def test_random_layers_draw_by_seed_step_and_cell(learner):
    drawn = []

    def note(images):
        drawn.append(torch.rand(()).item())
        return learner.model(images)

    learner.strategy.train_forward = lambda _, images: note(images)
    steps = batches(learner, 2)
    train(learner, steps)
    learner.step, first = 0, list(drawn)
    assert len(set(first)) == len(first) == 2 * cases.ACCUMULATE
    drawn.clear()
    torch.rand(7)
    train(learner, steps)
    assert drawn == first


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_few_kernels_move_an_average_as_many_do(kind):
    generator = torch.Generator().manual_seed(0)
    olds, news = (
        [torch.randn(size, generator=generator).to(kind) for size in (3, 5)] for _ in range(2)
    )
    share = torch.tensor(0.25, dtype=torch.float32)
    found = []
    for few in (False, True):
        tensors = [old.clone() for old in olds]
        approach(tensors, news, share, few_kernels=few)
        found.append(tensors)
    torch.testing.assert_close(found[0], found[1])
    assert torch.allclose(found[0][0], olds[0] + 0.25 * (news[0] - olds[0]))
