"""SGD and schedules: equal to torch's, suppressible, functions of samples alone."""

import pytest
import torch
from cases import CPU, make_learner, make_steps

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import VisionModel
from visiontrain.core.own import named
from visiontrain.core.types import Place
from visiontrain.engine.config import OptimConfig
from visiontrain.engine.learner import fill_state
from visiontrain.engine.muon import OTHERS, Muon, orthogonal
from visiontrain.engine.optim import Schedule, build_optimizer, share_of
from visiontrain.engine.sgd import SGD
from visiontrain.engine.step import train_step
from visiontrain.models.config import OwnModel, Timm, YoloN
from visiontrain.models.registry import build_model


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (3, 50)]


def plain(*blocks):
    """Make a model of blocks in a row, none of which may come pretrained."""
    model = VisionModel()
    model.blocks = torch.nn.ModuleDict({f"b{n}": block for n, block in enumerate(blocks)})
    return model


def steps(optimizer, params, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_sgd_equals_torchs(weight_decay, nesterov):
    mine, theirs = parameters(), parameters()
    group = {"params": mine, "weight_decay": weight_decay, "lr": 0.1}
    own = SGD([group], momentum=0.9, nesterov=nesterov)
    fill_state(own)
    reference = torch.optim.SGD(
        theirs, lr=0.1, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay
    )
    steps(own, mine, 5)
    steps(reference, theirs, 5)
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("shape", [(4, 3), (3, 50), (64, 16), (16, 1, 3, 3)])
def test_steps_of_matrices_are_orthogonal(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).flatten(1)
    values = torch.linalg.svdvals(orthogonal(matrix.double()))
    assert 0.6 < values.min() <= values.max() < 1.3
    one, other, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    _, _, third = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (orthogonal(matrix.double()) * (one @ third)).sum() > 0.6 * len(other)  # no turn


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (8, 12), (8, 8)])
@pytest.mark.parametrize("rank", [1, 8])
def test_wide_matrices_are_iterated_on_as_jordan_does(shape, rank):
    random = torch.Generator().manual_seed(3)
    matrix = torch.randn(shape[0], rank, generator=random) @ torch.randn(
        rank, shape[1], generator=random
    )
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    x = wide / wide.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    want = x if shape[0] <= shape[1] else x.T
    torch.testing.assert_close(orthogonal(matrix.double()), want, rtol=0, atol=1e-7)
    torch.testing.assert_close(orthogonal(matrix).double(), want, rtol=0, atol=1e-3)


def test_muon_turns_matrices_and_moves_vectors_as_adamw_does():
    generator = torch.Generator().manual_seed(2)
    start = [torch.randn(5, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)]
    mine, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    group = {"weight_decay": 0.5, "lr_share": 1.0}
    own = Muon([{"params": mine, **group}], betas=(0.9, 0.99))
    fill_state(own)
    for part in own.param_groups:
        part["lr"] = 0.1 * part["lr_share"]
    reference = torch.optim.AdamW(theirs[:1], lr=0.1 * OTHERS, betas=(0.9, 0.99), weight_decay=0.5)
    steps(own, mine, 1)
    moved = (start[1] * (1 - 0.1 * 0.5) - mine[1]).detach().flatten(1)  # beside the decay
    values = torch.linalg.svdvals(moved / 0.1)
    assert 0.6 < values.min() <= values.max() < 1.3
    steps(reference, theirs, 1)
    steps(own, mine, 4)
    steps(reference, theirs, 4)
    torch.testing.assert_close(mine[0], theirs[0])


def test_muon_keeps_nesterovs_momentum():
    start = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    parameter = torch.nn.Parameter(start.clone())
    own = Muon([{"params": [parameter], "lr": 1.0}], betas=(0.75, 0.99))
    fill_state(own)
    first, second = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(4))
    kept = 0.25 * first
    expected = start - orthogonal(0.25 * first + 0.75 * kept)
    kept = 0.75 * kept + 0.25 * second
    expected = expected - orthogonal(0.25 * second + 0.75 * kept)
    for grad in (first, second):
        parameter.grad = grad.clone()
        own.step()
    torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failed_step_leaves_everything_bit_identical(kind, first):
    model = plain(torch.nn.Linear(4, 3))
    optimizer = build_optimizer(OptimConfig(kind=kind), model)
    fill_state(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    if not first:
        steps(optimizer, list(model.parameters()), 2)

    def everything():
        state = [v for s in optimizer.state.values() for v in s.values()]
        return [t.detach().clone() for t in (*model.parameters(), *state)]

    before = everything()
    optimizer.found_inf = torch.tensor(1.0)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    steps(optimizer, list(model.parameters()), 1)
    after = everything()
    assert not torch.equal(before[0], after[0])
    assert all(torch.isfinite(t).all() for t in after)


def test_norms_and_biases_do_not_decay():
    model = plain(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = build_optimizer(OptimConfig(weight_decay=0.3), model)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decay[p] for p in model.parameters()] == [0.3, 0.0, 0.0, 0.0]


def test_blocks_without_parameters_are_no_step_of_the_rate():
    model = build_model(YoloN(backbone="swin_tiny_patch4_window7_224"), 2)
    assert model.body[-1] == "blocks.stage3_1."
    assert share_of(OptimConfig(layer_decay=0.5), model, "blocks.stage3_0.norm1.weight") == 0.5


def test_rates_by_block_are_refused_where_the_body_is_one_block():
    model = build_model(YoloN(backbone="regnetx_002"), 2)
    with pytest.raises(ConfigError, match=r"^optim.layer_decay: 0.5; this backbone is one block"):
        build_optimizer(OptimConfig(layer_decay=0.5), model)
    shares = {g["lr_share"] for g in build_optimizer(OptimConfig(body_lr=0.5), model).param_groups}
    assert shares == {0.5, 1.0}


@pytest.mark.parametrize("key", ["body_lr", "layer_decay"])
def test_rates_of_a_body_are_refused_where_a_model_names_none(key):
    model = build_model(OwnModel(own=named("model", torch.nn.Linear(4, 2))), 2, "classify")
    build_optimizer(OptimConfig(), model)
    with pytest.raises(ConfigError, match=rf"^optim.{key}: 0.5; this model names no body, leave"):
        build_optimizer(OptimConfig(**{key: 0.5}), model)


def test_places_and_tokens_of_transformers_do_not_decay():
    model = build_model(YoloN(backbone="vit_tiny_patch16_224"), 2)
    optimizer = build_optimizer(OptimConfig(), model)
    decay = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    decays = {name: bool(decay[p]) for name, p in model.named_parameters()}
    (stem,) = (name for name in decays if name.endswith("pos_embed"))
    assert not decays[stem]
    assert decays["blocks.block3.attn.qkv.weight"]
    assert not decays["blocks.block3.attn.qkv.bias"]


def rates(learner, prefix):
    """Name the rates that parameters of `prefix` got in the last step."""
    named = dict(learner.model.named_parameters())
    mine = {p for name, p in named.items() if name.startswith(prefix)}
    assert mine
    groups = learner.optimizer.param_groups
    return {round(g["lr"] / learner.lr, 6) for g in groups if mine & set(g["params"])}


def test_the_body_and_its_early_blocks_move_slower():
    run = {"strategy": {"kind": "single"}, "precision": "fp32", "norm": "frozen"}
    slower = {"body_lr": 0.5, "layer_decay": 0.8}
    learner = make_learner(Place(CPU), run | {"optim": slower, "model": {"backbone": "resnet18"}})
    step = next(make_steps(learner.strategy))
    train_step(learner, step.micro_batches, step.images)
    assert rates(learner, "blocks.layer4_1.") == {0.5}
    assert rates(learner, "blocks.layer4_0.") == {0.4}
    assert rates(learner, "blocks.layer3_1.") == {0.32}
    assert rates(learner, "blocks.stem.") == {round(0.5 * 0.8**8, 6)}
    assert rates(learner, "blocks.head.") == rates(learner, "blocks.up4.") == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_rate_rises_to_its_peak_and_falls_to_its_end(shape):
    config = OptimConfig(lr=1.0, lr_final=0.1, schedule=shape, warmup=2)
    schedule = Schedule(config, epochs=50, images=100, batch=10)
    rates = [schedule.lr(samples) for samples in range(0, 5000, 10)]
    warm = 20  # steps: 2 epochs of 10
    assert rates[0] == pytest.approx(1 / warm, rel=1e-2)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert schedule.lr(5000) == pytest.approx(1.0 if shape == "constant" else 0.1)


def test_warm_up_takes_at_most_a_tenth_of_the_run():
    schedule = Schedule(OptimConfig(lr=1.0, warmup=3, schedule="constant"), 3, 100, 10)
    assert schedule.lr(30) == 1.0


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_the_average_is_of_the_end_of_a_run_of_any_length(steps):
    schedule = Schedule(OptimConfig(ema_window=0.05), 1, 10 * steps, 10)
    weight, weights = 1.0, []  # of each step's weights in the last average, newest first
    for step in reversed(range(steps)):
        share = schedule.ema_share(10 * step)
        weights.append(weight * share)
        weight *= 1 - share
    assert sum(weights) == pytest.approx(1.0)
    assert 0.05 < sum(weights[: steps // 100]) < 0.3, "it is hardly an average"
    assert sum(weights[: steps // 20]) > 0.5, "it lags"
    assert sum(weights[: steps // 4]) > 0.99


@pytest.mark.parametrize(("shape", "scale"), [((32, 8), 2.0), ((8, 32), 1.0)])
def test_tall_matrices_step_by_the_root_of_rows_over_columns(shape, scale):
    generator = torch.Generator().manual_seed(5)
    start, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    parameter = torch.nn.Parameter(start.clone())
    own = Muon([{"params": [parameter], "lr": 0.1}], betas=(0.9, 0.99))
    fill_state(own)
    parameter.grad = grad
    own.step()
    values = torch.linalg.svdvals((start - parameter.detach()) / 0.1)
    assert 0.6 * scale < values.min() <= values.max() < 1.3 * scale


def test_a_new_classifier_has_the_whole_rate_on_networks_of_one_block_too():
    model = build_model(Timm(backbone="regnetx_002", pretrained="none"), 3, "classify")
    config = OptimConfig(body_lr=0.1)
    build_optimizer(config, model)
    shares = {name: share_of(config, model, name) for name, _ in model.named_parameters()}
    assert [name for name, share in shares.items() if share == 1] == [
        "blocks.all.net.head.fc.weight",
        "blocks.all.net.head.fc.bias",
    ]
    with pytest.raises(ConfigError, match=r"^optim.layer_decay: 0.5; this backbone is one block"):
        build_optimizer(OptimConfig(layer_decay=0.5), model)
