"""Parameter servers in one process: what pushes and pulls come to, whoever dies meanwhile."""

from __future__ import annotations

import logging
import random
import time

import pytest
import threads
import torch

from visiontrain import app, elsewhere
from visiontrain.core.config import load
from visiontrain.core.errors import ConfigError, DataError, RankError
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Place
from visiontrain.engine.trace import compare, record
from visiontrain.prepare import below
from visiontrain.recipe import Run
from visiontrain.run_checks import check_values
from visiontrain.strategies import registry
from visiontrain.strategies.config import Single

pytestmark = pytest.mark.usefixtures("one_thread")
SORTS = (
    "data=digits",
    "task=classify",
    "augment=classify",
    "model=resnet_tiny",
    "model.widths=[4,8,8]",
    "imgsz=32",
    "data.train_images=24",
    "data.val_images=4",
    "batch=6",
    "epochs=2",
)
FINDS = (
    "data=digits",
    "imgsz=64",
    "data.train_images=24",
    "data.val_images=4",
    "batch=7",
    "accumulate=2",
    "epochs=2",
)
EVERYWHERE = ("model.norm=group", "precision=fp64", "workers=0", "device=cpu")
SERVERS = "strategy=parameter_server"
PLAIN = (  # SGD whose updates add up
    "optim=sgd",
    "optim.momentum=0",
    "optim.schedule=constant",
    "optim.warmup=0",
    "optim.weight_decay=0",
    "optim.clip=1e9",
    "ema=false",
)


@pytest.fixture
def made(monkeypatch):
    drivers = []
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", threads.driver_of(drivers))
    return drivers


@pytest.fixture
def long_segments(monkeypatch):
    """Let workers go on for four steps before anything rests; a traced run rests at each."""
    real = app.step_source
    monkeypatch.setattr(app, "step_source", lambda *parts: real(*parts[:3], 4))


def run_of(*words):
    run = load(Run, [*words, *EVERYWHERE], shipped("cfg"), below=below)
    check_values(run)
    return run


def train(run, steps=8):
    place = Place(torch.device("cpu"))
    learner, source = app.build_traced(run.model_dump_json(), place, {})
    with learner.strategy.running():
        return record(learner, source, steps)


def alone(run):
    return train(run.model_copy(update={"strategy": Single()}))


def far(run):
    return compare(alone(run), train(run)).as_dict()


EXACT = ("samples", "counts", "terms", "norms", "first", "last", "weights", "ema", "optimizer")


@pytest.mark.parametrize("optim", ["adamw", "sgd", "muon"])
def test_bsp_with_two_workers_and_two_servers_is_one_device(optim, made):
    gaps = far(run_of(*SORTS, SERVERS, "strategy.servers=2", f"optim={optim}", "optim.clip=0.5"))
    assert {name: gap for name, gap in gaps.items() if gap > 1e-9} == {}
    assert made[0].totals.updates == 8
    assert len(made[0].totals.units) == 2  # both worked
    for name, seconds in made[0].totals.exchanged.items():
        assert 0 < seconds < made[0].totals.worked[name]


def test_waiting_for_workers_that_start_is_no_training(made, monkeypatch):
    real = elsewhere.compute

    def late(remote, name, link):
        time.sleep(1)
        real(remote, name, link)

    monkeypatch.setattr(elsewhere, "compute", late)
    began = time.monotonic()
    train(run_of(*SORTS, SERVERS), 2)
    whole, trained = time.monotonic() - began, made[0].totals.seconds
    assert 1 <= made[0].starting <= whole - trained


def test_bsp_finds_objects_as_one_device_does(made):
    gaps = far(run_of(*FINDS, SERVERS, "strategy.servers=3", "strategy.processes=3"))
    assert {name: gap for name, gap in gaps.items() if gap > 1e-9} == {}


@pytest.mark.parametrize("sync", ["asp", "ssp"])
def test_one_worker_alone_is_one_device(sync, made):
    run = run_of(*SORTS, SERVERS, "strategy.processes=1", f"strategy.sync={sync}")
    gaps = far(run)
    assert {name: gap for name, gap in gaps.items() if gap > 0} == {}


def test_ssp_without_staleness_is_bsp_for_plain_sgd_and_not_with_momentum(made):
    ssp = (SERVERS, "strategy.sync=ssp", "strategy.staleness=0", *PLAIN)
    assert far(run_of(*SORTS, *ssp))["weights"] < 1e-12
    pushed = {*ssp, "optim.momentum=0.9"} - {"optim.momentum=0"}
    assert far(run_of(*SORTS, *pushed))["weights"] > 1e-6


def test_asp_is_not_one_device(made, long_segments):
    # Else the tests above would pass for any rule.
    assert far(run_of(*SORTS, SERVERS, "strategy.sync=asp"))["weights"] > 1e-6


@pytest.mark.parametrize("compress", ["fp16", "bf16", "powersgd", "topk"])
def test_what_is_compressed_is_near(compress, made):
    run = run_of(*SORTS, SERVERS, f"strategy.compress={compress}", *PLAIN, "optim.lr=0.05")
    want, got = alone(run), train(run)
    gap = compare(want, got).weights
    moved = compare(alone_at_start(run), want).weights
    assert 0 < gap < moved * (0.05 if compress.endswith("16") else 1)
    whole = 8 * 2 * sum(t.numel() * 8 for n, t in got.tensors.items() if n.startswith("model/"))
    assert made[0].totals.pushed < 0.6 * whole + 40_000


def alone_at_start(run):
    return train(run.model_copy(update={"strategy": Single()}), steps=1)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum"])
def test_a_rule_stands_a_worker_that_sends_nonsense(rule, made, monkeypatch):
    words = (*SORTS, SERVERS, "strategy.processes=4", f"strategy.aggregate={rule}", *PLAIN)
    good = train(run_of(*words))
    real = elsewhere.train_step

    def lying(learner, micro_batches, images):
        if learner.strategy.talk.unit.share == 3:
            divide = learner.strategy.divide

            def worse(learner, loss):
                loss = divide(learner, loss)
                for p in learner.model.parameters():
                    p.grad.mul_(-100)
                return loss

            monkeypatch.setattr(learner.strategy, "divide", worse)
            result = real(learner, micro_batches, images)
            monkeypatch.setattr(learner.strategy, "divide", divide)
            return result
        return real(learner, micro_batches, images)

    monkeypatch.setattr(elsewhere, "train_step", lying)
    bad = train(run_of(*words))
    worst = train(run_of(*SORTS, SERVERS, "strategy.processes=4", *PLAIN))
    assert compare(good, bad).weights < 0.1 * compare(good, worst).weights


# -- faults ---------------------------------------------------------------------------


class Faults:
    """Kills workers and servers at chosen calls."""

    def __init__(self, drivers, at, seed):
        self.drivers, self.at, self.random = drivers, sorted(at), random.Random(seed)
        self.calls = 0

    def __call__(self, worker, method):
        self.calls += 1
        if not self.at or self.calls < self.at[0]:
            return
        self.at.pop(0)
        engine = self.drivers[0].engine
        if self.random.random() < 0.5:
            engine.kill_worker(self.random.choice(sorted(engine.names)))
        else:
            engine.kill_server(self.random.randrange(engine.config.servers))


@pytest.mark.parametrize("sync", ["bsp", "asp", "ssp", "backup", "easgd"])
@pytest.mark.parametrize("seed", range(3))
def test_whoever_dies_every_image_is_trained_on_once(sync, seed, monkeypatch, long_segments):
    drivers, draw = [], random.Random(seed)
    faults = Faults(drivers, draw.sample(range(3, 50), 4), seed)
    mode = threads.driver_of(drivers, faults)
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", mode)
    run = run_of(
        *SORTS,
        SERVERS,
        "strategy.processes=3",
        "strategy.servers=2",
        f"strategy.sync={sync}",
        "strategy.max_restarts=20",
        "strategy.snapshot_every=2",
    )
    gaps = compare(alone(run), train(run)).as_dict()

    assert gaps["samples"] == 0
    assert drivers[0].totals.restarts > 0
    assert drivers[0].totals.lost <= drivers[0].totals.updates
    if sync == "bsp":  # not even rounding: each share has its place
        assert gaps["weights"] < 1e-9
        assert gaps["optimizer"] < 1e-9


def test_a_worker_that_makes_all_gradients_of_a_step_leaves_the_same_statistics(monkeypatch):
    run = run_of(*SORTS, SERVERS, "strategy.max_restarts=9")
    run = run.model_copy(update={"model": run.model.model_copy(update={"norm": "batch"})})
    drivers = []
    mode = threads.driver_of(drivers, Faults(drivers, range(3, 60, 8), 1))
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", threads.driver_of([]))
    whole = train(run)
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", mode)
    found = train(run)
    assert drivers[0].totals.restarts > 2
    statistics = [name for name in whole.tensors if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(found.tensors[name], whole.tensors[name], rtol=0, atol=1e-12)


def test_statistics_of_norms_are_those_of_the_whole_batch(made):
    """Each worker's are of its own share, all as large: the servers take the mean."""
    run = run_of(*SORTS, SERVERS)
    run = run.model_copy(update={"model": run.model.model_copy(update={"norm": "batch"})})
    one = run.model_copy(update={"strategy": Single()})
    name = "model/blocks.stage1.enter_norm.running_mean"  # no other norm comes before it
    want, got = (train(some, steps=1).tensors[name] for some in (one, run))
    assert want.abs().max() > 1e-4
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_one_elastic_worker_that_meets_halfway_is_one_device_at_half_the_rate(made):
    elastic = ("strategy.sync=easgd", "strategy.processes=1", "strategy.meet_every=1")
    run = run_of(*SORTS, SERVERS, *elastic, "strategy.elasticity=0.5", *PLAIN, "optim.lr=0.05")
    want = alone(run_of(*SORTS, *PLAIN, "optim.lr=0.025"))
    assert compare(want, train(run)).weights < 1e-12


def test_of_an_elastic_worker_meetings_are_updates(made):
    """A server numbers these alone; snapshots of it are looked for by its number."""
    elastic = ("strategy.sync=easgd", "strategy.processes=1", "strategy.meet_every=2")
    train(run_of(*SORTS, SERVERS, *elastic))
    driver = made[0]
    assert driver._position["version"] == driver.totals.updates == 4


def test_one_fault_too_many_ends_the_run(monkeypatch):
    drivers = []
    mode = threads.driver_of(drivers, Faults(drivers, [3, 6, 9, 12], 0))
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", mode)
    with pytest.raises(RankError, match="ended without a word"):
        train(run_of(*SORTS, SERVERS, "strategy.max_restarts=1"))


def test_a_server_that_cannot_be_made_ends_the_run_with_its_own_line(made, monkeypatch):
    def failing(remote, number):
        raise ConfigError(f"model.backbone: none on server {number}; take another")

    monkeypatch.setattr(elsewhere, "build_shard", failing)
    with pytest.raises(ConfigError, match=r"^model\.backbone: none on server 0; take another$"):
        train(run_of(*SORTS, SERVERS))


def test_a_server_that_fails_for_another_reason_is_named(made, monkeypatch):
    monkeypatch.setattr(elsewhere, "build_shard", lambda remote, number: 1 / number)
    with pytest.raises(RankError, match=r"^server 0: ZeroDivisionError: division by zero"):
        train(run_of(*SORTS, SERVERS, "strategy.max_restarts=1"))


def test_a_hub_that_died_ends_the_run_and_is_named(monkeypatch):
    drivers = []

    def before(worker, method):
        if method == "push":
            drivers[0].engine.kill_hub()

    monkeypatch.setitem(registry.DRIVERS, "parameter_server", threads.driver_of(drivers, before))
    with pytest.raises(RankError, match=r"^hub: ended without a word; .* resume=true$"):
        train(run_of(*SORTS, SERVERS))


def test_a_worker_with_other_data_says_so(made, monkeypatch):
    real = elsewhere.open_dataset

    def fewer(config, kind):
        return real(config.model_copy(update={"train_images": 20}), kind)

    monkeypatch.setattr(elsewhere, "open_dataset", fewer)
    with pytest.raises(DataError, match="20 images in train"):
        train(run_of(*SORTS, SERVERS))


def test_a_worker_that_hangs_is_replaced(made, monkeypatch, caplog):
    real, hung = elsewhere.train_step, []

    def hanging(learner, micro_batches, images):
        if not hung:
            hung.append(learner.strategy.talk.name)
            engine = made[0].engine
            life = engine.names[hung[0]]
            while life not in engine.killed:
                pass
        return real(learner, micro_batches, images)

    monkeypatch.setattr(elsewhere, "train_step", hanging)
    run = run_of(*SORTS, SERVERS, "strategy.timeout_s=2")
    with caplog.at_level(logging.WARNING):
        gaps = far(run)
    assert f"{hung[0]}: at one share of a step for 2 s" in caplog.text
    assert gaps["weights"] < 1e-9


# -- keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy.staleness=4"], "add strategy.sync=ssp"),
        (["strategy.stale_lr=true"], "add strategy.sync=asp"),
        (["strategy.spare=2"], "add strategy.sync=backup"),
        (["strategy.meet_every=2"], "add strategy.sync=easgd"),
        (["strategy.sync=backup", "strategy.spare=2"], "spare: 2 of 2 workers"),
        (["strategy.aggregate=median"], "3 workers or more"),
        (["strategy.aggregate=krum", "strategy.servers=2"], "take strategy.servers=1"),
        (["strategy.aggregate=median", "strategy.sync=asp"], "take strategy.sync=bsp"),
        (["strategy.compress=topk", "strategy.sync=easgd"], "take strategy.sync=bsp"),
        (["precision=fp16"], "take bf16"),
    ],
)
def test_keys_that_do_nothing_or_do_not_go_together_are_refused(words, said):
    words = [word for word in EVERYWHERE if not word.startswith("precision")] + words
    with pytest.raises(ConfigError, match=said):
        check_values(load(Run, [*SORTS, SERVERS, *words], shipped("cfg"), below=below))


def test_more_servers_than_tensors_are_refused(made):
    with pytest.raises(ConfigError, match=r"strategy\.servers: 1000"):
        app.build_traced(
            run_of(*SORTS, SERVERS, "strategy.servers=1000").model_dump_json(),
            Place(torch.device("cpu")),
            {},
        )
