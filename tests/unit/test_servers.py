"""Parameter servers in one process: what pushes and pulls come to, whoever dies meanwhile."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import threads
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontrain import app, elsewhere
from visiontrain.core.config import load
from visiontrain.core.errors import ConfigError, DataError, RankError
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Place
from visiontrain.engine.trace import compare, record
from visiontrain.prepare import below
from visiontrain.recipe import Run, check_values
from visiontrain.strategies import registry
from visiontrain.strategies.config import Single
from visiontrain.strategies.parameter_server.encoding import Largest, LowRank, Whole
from visiontrain.strategies.parameter_server.ledger import Slot
from visiontrain.strategies.parameter_server.wire import (
    HEAD,
    MOST_HEADER,
    RefusedError,
    Schema,
    pack,
    split,
    unpack,
)
from visiontrain.strategies.remote import Remote

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
    monkeypatch.setitem(registry.STRATEGIES, "parameter_server", threads.driver_of(drivers))
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
    assert far(run_of(*SORTS, SERVERS, "strategy.sync=asp", *PLAIN))["weights"] > 1e-9


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
    monkeypatch.setitem(registry.STRATEGIES, "parameter_server", mode)
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
    if sync == "bsp":  # not even rounding: each share has its place
        assert gaps["weights"] < 1e-9
        assert gaps["optimizer"] < 1e-9


def test_one_fault_too_many_ends_the_run(monkeypatch):
    drivers = []
    mode = threads.driver_of(drivers, Faults(drivers, [3, 6, 9, 12], 0))
    monkeypatch.setitem(registry.STRATEGIES, "parameter_server", mode)
    with pytest.raises(RankError, match="ended without a word"):
        train(run_of(*SORTS, SERVERS, "strategy.max_restarts=1"))


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


# -- a shard --------------------------------------------------------------------------


def shard_of(*words):
    run = run_of(*SORTS, SERVERS, *words)
    remote = Remote(run.model_dump_json(), "", None, {}, names=[str(n) for n in range(10)])
    remote.images = 24
    learner, _ = app.build_traced(
        run.model_copy(update={"strategy": Single()}).model_dump_json(),
        Place(torch.device("cpu")),
        {},
    )
    remote.parts = [list(learner.live)]
    shard = elsewhere.build_shard(remote, 0)
    shard.load(shard.state(), {"version": 0, "step": 0, "samples": 0})
    return shard


def push_of(shard, value=1e-3, **meta):
    shapes = {f.name: torch.full(f.shape, value, dtype=f.dtype) for f in shard.pushed.fields}
    heads = shard.learner.task.heads
    values = {"counts": dict.fromkeys(heads, 3.0), "images": 3, "version": 0} | meta
    return pack(shard.pushed, shapes, values)


def refused(shard, message):
    before = {name: t.clone() for name, t in shard.live.items()}
    with pytest.raises(RefusedError, match="worker 1: ") as caught:
        shard.push(message, Slot(0, 1, 2), "worker 1")
    assert all(torch.equal(before[name], t) for name, t in shard.live.items())
    assert shard.refused[-1] == f"worker 1: refused: {str(caught.value).removeprefix('worker 1: ')}"
    return str(caught.value)


def test_what_a_worker_must_not_send_is_refused_and_the_run_goes_on():
    shard = shard_of()
    assert "not finite" in refused(shard, push_of(shard, float("nan")))
    other = Schema.of({"gradient/stem.weight": torch.zeros(3)})
    wrong = pack(other, {"gradient/stem.weight": torch.zeros(3)}, {})
    assert "other names, shapes or types" in refused(shard, wrong)
    huge = np.zeros(shard.pushed.nbytes + 100_000_000, np.uint8)
    assert f"{len(huge)} bytes; the schema allows" in refused(shard, huge)
    assert "begin as a message" in refused(shard, np.zeros(5, np.uint8))
    for meta in ({"counts": {}}, {"images": -1}, {"version": "x"}, {"images": float("inf")}):
        assert "counts" in refused(shard, push_of(shard, **meta))

    # Its place is filled with nothing: the update is that of the other.
    assert shard.push(push_of(shard), Slot(0, 0, 2), "worker 0")
    applied = shard.apply(0, shard.prepare(0))
    assert shard.version == 1
    assert 0 < applied.norm < 1


def test_an_update_whose_gradients_were_all_refused_changes_nothing():
    shard = shard_of()
    before = {name: t.clone() for name, t in shard.state().items()}
    refused(shard, push_of(shard, float("inf")))
    with pytest.raises(RefusedError):
        shard.push(push_of(shard, float("nan")), Slot(0, 0, 2), "worker 0")
    assert shard.is_complete(Slot(0, 0, 2))
    assert np.isnan(shard.apply(0, shard.prepare(0)).norm)
    assert all(torch.equal(before[name], t) for name, t in shard.state().items())


def test_a_gradient_that_comes_twice_counts_once():
    shard = shard_of("strategy.sync=asp")
    slot = Slot(5, 0, 1)
    assert shard.push(push_of(shard), slot, "worker 0")
    squared = shard.prepare(5)
    shard.apply(5, squared)
    assert shard.already(5) == squared
    assert shard.already(6) is None


def test_pulls_send_what_changed():
    shard = shard_of("freeze=2", "strategy.sync=asp")
    everything = shard.pull(-1)
    assert unpack(everything, shard.pulled)[0].keys() == shard.live.keys()
    assert unpack(shard.pull(0), shard.pulled)[0] == {}
    shard.push(push_of(shard), Slot(0, 0, 1), "worker 0")
    shard.apply(0, shard.prepare(0))
    tensors, meta = unpack(shard.pull(0), shard.pulled)
    assert meta["version"] == 1
    assert tensors.keys() >= shard.trained.keys()
    assert len(tensors) < len(shard.live)  # what is frozen stays at home
    assert all(torch.equal(t, shard.live[name]) for name, t in tensors.items())


@pytest.mark.parametrize(("late", "share"), [(0, 1 / 3), (2, 1 / 3), (6, 1 / 9)])
def test_the_older_the_weights_the_lower_the_rate(late, share):
    words = ("strategy.processes=3", "strategy.sync=asp", "strategy.stale_lr=true", *PLAIN)
    shard = shard_of(*words, "optim.lr=1.0")
    shard.version = late
    before = {name: t.clone() for name, t in shard.trained.items()}
    shard.push(push_of(shard), Slot(0, 0, 1), "worker 0")
    applied = shard.apply(0, shard.prepare(0))
    assert applied.staleness == late
    for name, t in shard.trained.items():
        assert torch.allclose(before[name] - t, torch.full_like(t, share * 1e-3 / 3))


# -- what travels ---------------------------------------------------------------------

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(2, dtype=torch.int32)}
TENSORS["c"] = torch.ones(4, dtype=torch.bfloat16)


@given(st.sets(st.sampled_from("abc")))
def test_messages_come_back_as_they_went(names):
    schema = Schema.of(TENSORS)
    tensors, meta = unpack(pack(schema, {n: TENSORS[n] for n in names}, {"x": 1}), schema)
    assert tensors.keys() == names
    assert all(torch.equal(t, TENSORS[n]) for n, t in tensors.items())
    assert meta == {"x": 1}


@settings(max_examples=300)
@given(st.data())
def test_a_spoilt_message_is_refused_or_read_never_worse(data):
    schema = Schema.of(TENSORS)
    message = pack(schema, TENSORS, {"x": 1}).copy()
    start = int.from_bytes(bytes(message[8:HEAD]), "big") + HEAD
    kind = data.draw(st.sampled_from(["cut", "longer", "flip"]))
    if kind == "cut":
        message = message[: data.draw(st.integers(0, len(message) - 1))]
    elif kind == "longer":
        more = data.draw(st.sampled_from([1, 100, MOST_HEADER + schema.nbytes]))
        message = np.concatenate([message, np.zeros(more, np.uint8)])
    else:
        at = data.draw(st.integers(0, start - 1))
        message[at] ^= data.draw(st.integers(1, 255))
    try:
        tensors, _ = unpack(message, schema)
    except RefusedError:
        return
    assert kind == "flip"  # a name in what goes along
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in TENSORS.items()}


@pytest.mark.parametrize(
    "header",
    [
        {},
        [],
        {"schema": 1, "which": None, "bytes": 34, "meta": []},
        {"schema": None, "which": [0, 0], "bytes": 48, "meta": {}},
        {"schema": None, "which": [2, 1], "bytes": 12, "meta": {}},
        {"schema": None, "which": [True], "bytes": 4, "meta": {}},
        {"schema": None, "which": [9], "bytes": 0, "meta": {}},
        {"schema": None, "which": {}, "bytes": 0, "meta": {}},
    ],
)
def test_a_header_that_lies_is_refused(header):
    schema = Schema.of(TENSORS)
    if isinstance(header, dict) and "schema" in header and header["schema"] is None:
        header = header | {"schema": schema.digest}
    text = json.dumps(header).encode()
    size = header.get("bytes", 0) if isinstance(header, dict) else 0
    message = b"visiontr" + len(text).to_bytes(4, "big") + text + bytes(size)
    with pytest.raises(RefusedError):
        unpack(np.frombuffer(message, np.uint8), schema)


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 1000), min_size=3),
    st.integers(1, 3),
)
def test_parts_are_whole_tensors_of_about_as_many_bytes(sizes, parts):
    made = split(sizes, parts)
    assert sorted(name for part in made for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in made]
    assert max(loads) - min(loads) <= max(sizes.values())


@pytest.mark.parametrize("encoding", [Whole(), Whole(torch.float16), Largest(0.2), LowRank(2)])
def test_what_is_left_out_is_sent_later(encoding):
    torch.manual_seed(0)
    gradients = {"m": torch.randn(24, 6, 3, 3), "v": torch.randn(5)}
    shapes = {name: tuple(t.shape) for name, t in gradients.items()}
    sums = {name: torch.zeros_like(t) for name, t in gradients.items()}
    for _ in range(60):
        sent = encoding.encode(gradients)
        for name, value in encoding.decode(sent, shapes).items():
            sums[name] += value
        for memory in encoding.memories.values():
            memory.settle(torch.tensor(True))
    for name, total in sums.items():
        gap = (total / 60 - gradients[name]).norm() / gradients[name].norm()
        assert gap < 0.15


def test_places_outside_of_a_matrix_are_refused():
    encoding = Largest(0.5)
    sent = encoding.encode({"m": torch.ones(4, 4)})
    sent["m.index"][0] = 16
    with pytest.raises(RefusedError, match="places outside"):
        encoding.decode(sent, {"m": (4, 4)})


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
