"""Every way gradients or weights of ranks meet: what it sums, sends, remembers and survives."""

import re
from itertools import islice

import cases
import pytest
import torch

from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.engine.step import train_step
from visiontrain.strategies.aggregate import AGGREGATES
from visiontrain.strategies.base import DROPPED, Strategy
from visiontrain.strategies.compress import COMPRESSIONS, orthonormal
from visiontrain.strategies.config import DDP, check_data_parallel
from visiontrain.strategies.exchange import Bucket
from visiontrain.strategies.local_sgd import OUTERS
from visiontrain.strategies.wire import Wire

SGD = {"kind": "sgd", "clip": 1000.0, "momentum": 0.0, "weight_decay": 0.0}
LOSSY = {"compress_after": 0.0}
LEAVING = [
    {"compress": "powersgd"} | LOSSY,
    {"compress": "topk"} | LOSSY,
]
APART = [{"sync_every": 2, "outer": name} for name in sorted(OUTERS)]


def learner_of(strategy, precision="fp64", **changes):
    keys = {"kind": "ddp", **strategy}
    run = {"strategy": keys, "precision": precision, "optim": {"kind": "adamw", "clip": 8.0}}
    return cases.make_learner(cases.here("ddp"), run | changes)


def advance(learner, steps):
    """Train from where the learner stands; return each step's terms and gradient norm."""
    first = learner.step
    todo = islice(cases.make_steps(learner.strategy), first, first + steps)
    results = [train_step(learner, step.micro_batches, step.images) for step in todo]
    return [({k: v.item() for k, v in r.terms.items()}, r.grad_norm.item()) for r in results]


def states(learner):
    return {
        name: tensor.clone() for part in learner.collect().values() for name, tensor in part.items()
    }


def weights(learner):
    return {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}


def gap(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


# -- what is summed -------------------------------------------------------------------


def sums(strategy):
    learner = learner_of(strategy)
    return advance(learner, 2), learner.strategy.bytes_sent


@pytest.fixture(scope="module")
def plain(ranks):
    """Return what two and four ranks reach with nothing switched on, and the bytes."""
    return {world: ranks(world).run(sums, {})[0] for world in (2, 4)}


@pytest.mark.parametrize(
    ("world", "strategy"),
    [
        (4, {"topology": "hierarchical"}),
        (4, {"topology": "hierarchical", "inner": 1}),
        (2, {"compress": "topk", "topk": 1.0} | LOSSY),
        (2, {"compress": "powersgd", "powersgd_rank": 1000} | LOSSY),  # no matrix gets smaller
        (2, {"compress": "topk", "compress_after": 0.5}),  # not begun yet
    ],
)
def test_what_leaves_nothing_out_is_the_sum(world, strategy, ranks, plain):
    for results, _ in ranks(world).run(sums, strategy):
        for (terms, norm), (other_terms, other_norm) in zip(results, plain[world][0], strict=True):
            assert norm == pytest.approx(other_norm, rel=1e-9)
            assert terms == pytest.approx(other_terms, rel=1e-9)


@pytest.mark.parametrize("strategy", [{"compress": "fp16"}, {"compress": "bf16"}])
def test_half_precision_rounds(strategy, ranks, plain):
    (results, sent), _ = ranks(2).run(sums, strategy)
    (_, norm), (_, other) = results[0], plain[2][0][0]
    assert norm != other
    assert norm == pytest.approx(other, rel=1e-2)
    assert plain[2][1] / sent == pytest.approx(4)  # of fp64


def test_bytes_are_payload_times_the_collectives_factor(ranks, plain):
    def sent(world, **strategy):
        return {sent for _, sent in ranks(world).run(sums, strategy)}

    parameters = plain[2][1] // 8 // 2  # numbers; fp64, two steps, each sent and received once
    assert plain[4][1] == pytest.approx(2 * 3 / 4 * 8 * 2 * parameters, rel=1e-5)
    # Two rings inside, one of half as much between.
    ring = (2 * 1 / 2 + 2 * 1 / 2 / 2) * 8 * 2 * parameters
    assert sent(4, topology="hierarchical").pop() == pytest.approx(ring, rel=1e-3)
    assert sent(4, aggregate="median") == {3 * 8 * 2 * parameters}
    assert sent(4, aggregate="median", compress="bf16") == {3 * 2 * 2 * parameters}
    for compress in ("powersgd", "topk"):
        assert 0 < sent(2, compress=compress, **LOSSY).pop() < plain[2][1] / 5


# -- what is left out comes later -----------------------------------------------------


def owed(compress, steps):
    """Send the same gradients again and again; return what came, what is owed, what was meant."""
    place = cases.here("ddp")
    generator = torch.Generator().manual_seed(place.rank)
    shapes = {"a.weight": (16, 8, 3, 3), "b.weight": (24, 20), "b.bias": (24,)}
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    exchange = COMPRESSIONS[compress](DDP(topk=0.05), Wire(place, "flat", 2))
    came = {name: torch.zeros_like(grad) for name, grad in made.items()}
    for _ in range(steps):
        buffer = torch.cat([grad.flatten() for grad in made.values()])
        parts = buffer.split([grad.numel() for grad in made.values()])
        grads = [part.view_as(grad) for part, grad in zip(parts, made.values(), strict=True)]
        exchange.reduce(Bucket(buffer, list(made), grads, last=True)).wait()
        for memory in exchange.memories.values():
            memory.settle(torch.tensor(data=True))
        for name, grad in zip(made, grads, strict=True):
            came[name] += grad
    errors = exchange.memories["error"].state()
    return came, {name: errors.get(name) for name in made}, made


@pytest.mark.parametrize("compress", ["powersgd", "topk"])
def test_what_is_not_sent_is_owed(compress, ranks):
    steps = 12
    (came, owed0, made0), (other, owed1, made1) = ranks(2).run(owed, compress, steps)
    for name in came:
        assert torch.equal(came[name], other[name])
        meant = steps * (made0[name] + made1[name])
        debt = 0 if owed0[name] is None else (owed0[name] + owed1[name]).view_as(meant)
        torch.testing.assert_close(came[name] + debt, meant)
        assert (came[name] - meant).norm() < 0.7 * meant.norm()  # and it does come


def test_columns_are_made_orthonormal_and_dependent_ones_zero():
    columns = torch.randn(9, 3)
    columns[:, 1] = 2 * columns[:, 0]
    made = orthonormal(columns)
    want = torch.diag(torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(made.T @ made, want, atol=1e-5, rtol=0)
    assert orthonormal(torch.zeros(4, 2)).abs().max() == 0


# -- failed steps ---------------------------------------------------------------------


def fail(strategy):
    """Fail the second of three steps on the last rank; return how much it changed."""
    learner = learner_of(strategy, "fp32")
    steps = list(islice(cases.make_steps(learner.strategy), 3))
    train_step(learner, steps[0].micro_batches, steps[0].images)
    own = learner.strategy.collect_own(learner.tensors())
    before = weights(learner)
    batches = steps[1].micro_batches
    if learner.strategy.place.rank == 1:
        batches = [
            Batch(torch.full(b.images.shape, torch.nan), b.targets, b.ids, b.frame, b.valid)
            for b in batches
        ]
    train_step(learner, batches, steps[1].images)
    moved = gap(before, weights(learner))
    now = learner.strategy.collect_own(learner.tensors())
    same = all(torch.equal(own[name], now[name]) for name in own)
    train_step(learner, steps[2].micro_batches, steps[2].images)
    finite = all(tensor.isfinite().all() for tensor in states(learner).values())
    return moved, same, finite


@pytest.mark.parametrize("strategy", [*LEAVING, {"compress": "fp16"}], ids=str)
def test_a_step_that_failed_on_one_rank_fails_on_all_and_is_forgotten(strategy, ranks):
    for moved, same, finite in ranks(2).run(fail, strategy):
        assert (moved, same, finite) == (0, True, True)


# -- going on -------------------------------------------------------------------------


def go_on(strategy, reopened):
    """Save after three steps, go on for one; return gaps to going on at once, and what was said."""
    first = learner_of(strategy)
    advance(first, 3)  # between meetings
    saved, own = first.collect(), first.strategy.collect_own(first.tensors())
    everywhere = [own]
    torch.distributed.broadcast_object_list(everywhere)  # as all ranks read the file
    second = learner_of(reopened, seed=1)
    second.load(saved)
    said = second.strategy.load_own(everywhere[0], second.tensors())
    second.step, second.samples = first.step, first.samples
    advance(second, 1)
    whole = learner_of(strategy) if reopened == strategy else first  # to the bit: one never saved
    advance(whole, 4 - whole.step)
    return gap(weights(whole), weights(second)), gap(states(whole), states(second)), said


@pytest.mark.parametrize("strategy", [*LEAVING, *APART], ids=str)
def test_a_run_that_goes_on_is_the_same_to_the_bit(strategy, ranks):
    for mine, common, said in ranks(2).run(go_on, strategy, strategy):
        assert (mine, common, said) == (0, 0, None)


@pytest.mark.parametrize(
    ("saved", "reopened"),
    [
        *((LEAVING[0], APART[0]), (APART[0], {}), (LEAVING[1], {})),
        *((LEAVING[0], LEAVING[1]), (LEAVING[1], LEAVING[0])),
        (LEAVING[0], LEAVING[0] | {"powersgd_rank": 1}),
        *((APART[0], APART[1]), (APART[1], APART[0])),
    ],
    ids=str,
)
def test_another_mode_drops_what_ranks_held_and_says_so(saved, reopened, ranks):
    for _, common, said in ranks(2).run(go_on, saved, reopened):
        assert said == DROPPED
        assert common < 0.1


def scales(strategy):
    """Let the loss scale of one rank fall, save, and go on; return what each rank has then."""
    first = learner_of(strategy, "fp16")
    scale = first.strategy.precision.scale
    scale.fill_(64.0 if first.strategy.place.rank else 128.0)
    saved, everywhere = first.collect(), [first.strategy.collect_own(first.tensors())]
    torch.distributed.broadcast_object_list(everywhere)
    second = learner_of(strategy, "fp16")
    second.load(saved)
    assert second.strategy.load_own(everywhere[0], second.tensors()) is None
    alone = everywhere[0].get("loss_scale")
    return second.strategy.precision.scale.item(), None if alone is None else alone.item()


def test_ranks_apart_keep_their_own_loss_scales(ranks):
    assert ranks(2).run(scales, APART[0]) == [(128.0, 128.0), (64.0, 128.0)]


# -- weights that meet ----------------------------------------------------------------


def apart(strategy, steps):
    """Return this rank's weights after some steps, and what would be scored then."""
    learner = learner_of(strategy, optim=SGD)
    advance(learner, steps)
    before = weights(learner)
    with learner.evaluating() as model:
        learner.strategy.level(model)
        scored = weights(learner)
    assert gap(before, weights(learner)) == 0
    return before, scored, learner.collect()["ema"]


@pytest.mark.parametrize("outer", sorted(OUTERS))
def test_ranks_go_their_own_ways_and_meet(outer, ranks):
    strategy = {"sync_every": 2, "outer": outer}
    (one, scored, average), (other, scored_too, _) = ranks(2).run(apart, strategy, 3)
    assert gap(one, other) > 1e-6
    assert gap(scored, scored_too) == 0  # what is scored is the same on all,
    assert gap(average, scored) == 0  # and what is saved
    (one, *_), (other, *_) = ranks(2).run(apart, strategy, 4)
    assert gap(one, other) == 0


def test_diloco_with_an_outer_rate_of_one_and_no_momentum_is_the_average(ranks):
    plain = {"sync_every": 2}
    outer = {"sync_every": 2, "outer": "diloco", "outer_lr": 1.0, "outer_momentum": 0.0}
    (want, *_), _ = ranks(2).run(apart, plain, 4)
    (got, *_), _ = ranks(2).run(apart, outer, 4)
    assert gap(want, got) < 1e-12


def meet_at_once():
    """Take one step that ends in a meeting; return how far it is from the mean gradient's."""
    learner = learner_of({"sync_every": 2}, optim=SGD)
    learner.step = 1
    (step,) = islice(cases.make_steps(learner.strategy), 1)
    before = weights(learner)
    train_step(learner, step.micro_batches, step.images)
    own = {name: p.grad for name, p in learner.model.named_parameters()}
    mean = learner.strategy.collect(own)
    want = {name: before[name] - learner.lr * mean[name] for name in own}
    return gap(want, weights(learner)), gap(own, mean)


def test_a_meeting_after_one_step_of_plain_sgd_is_a_step_by_the_mean_gradient(ranks):
    for away, differing in ranks(2).run(meet_at_once):
        assert away < 1e-12
        assert differing > 1e-3


# -- wrong ranks ----------------------------------------------------------------------


def betrayed(rule, wrong):
    """Take a step with a last rank that sends `wrong` times its gradient; return what came.

    All ranks read the same images, so that without it their gradients are one.
    """
    learner = learner_of({"aggregate": rule, "processes": 4}, optim=SGD)
    if learner.strategy.place.rank == 3:
        learner.task = cases.Rescaled(
            learner.task,
            lambda loss: Loss({k: wrong * v for k, v in loss.terms.items()}, loss.counts),
        )
    alone = Strategy(Place(cases.CPU), learner.strategy.precision)
    (step,) = islice(cases.make_steps(alone, accumulate=1), 1)
    train_step(learner, step.micro_batches, step.images)
    return torch.cat([p.grad.flatten() for p in learner.model.parameters()])


def test_rules_hold_against_a_rank_that_sends_minus_ten_times_its_gradient(ranks):
    def gradient(rule, wrong):
        made = ranks(4).run(betrayed, rule, wrong)
        assert all(torch.equal(made[0], other) for other in made)
        return made[0]

    honest = gradient("mean", 1.0)
    torch.testing.assert_close(gradient("mean", -10.0), (3 - 10) / 4 * honest)
    for rule in sorted(AGGREGATES.keys() - {"mean"}):
        torch.testing.assert_close(gradient(rule, -10.0), honest)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"faulty": 2}, "faulty: 2; it changes nothing here, add strategy.aggregate=trimmed_mean"),
        ({"topk": 0.1}, "topk: 0.1; it changes nothing here"),
        ({"aggregate": "krum", "compress": "topk"}, "aggregate: krum with strategy.compress=topk"),
        ({"compress": "bf16", "sync_every": 4}, "compress: bf16 with strategy.sync_every=4"),
        ({"outer": "diloco"}, "outer: diloco; weights only meet with"),
    ],
)
def test_keys_that_change_nothing_or_do_not_go_together(keys, message):
    with pytest.raises(ConfigError, match="^strategy." + re.escape(message)):
        check_data_parallel(DDP(**keys))


def test_diloco_steps_as_sgd_with_nesterov_s_momentum_does():
    config = DDP(sync_every=2, outer="diloco")
    outer, generator = OUTERS["diloco"](config), torch.Generator().manual_seed(0)
    ours = torch.randn(5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    keys = {"lr": config.outer_lr, "momentum": config.outer_momentum, "nesterov": True}
    reference = torch.optim.SGD([theirs], **keys)
    outer.start({"w": ours})
    for _ in range(3):
        theirs.grad = torch.randn(5, generator=generator, dtype=torch.float64)
        outer.step({"w": ours}, {"w": ours - theirs.grad})  # where the ranks' mean is
        reference.step()
        torch.testing.assert_close(ours, theirs.detach())


def first_norm(strategy):
    return advance(learner_of(strategy, "fp16"), 1)[0][1]


@pytest.mark.parametrize(
    "strategy", [{"compress": "bf16"}, {"compress": "topk", "topk": 1.0} | LOSSY], ids=str
)
def test_a_loss_scale_is_taken_out_of_what_is_compressed(strategy, ranks, plain):
    for norm in ranks(2).run(first_norm, strategy):
        assert norm == pytest.approx(plain[2][0][0][1], rel=0.1)
