"""What pushes and pulls come to on one server."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_servers import PLAIN, SERVERS, SORTS, run_of

from visiontrain import app, elsewhere
from visiontrain.core.types import Place
from visiontrain.strategies.config import ParameterServer, Single
from visiontrain.strategies.parameter_server.ledger import Slot
from visiontrain.strategies.parameter_server.rules import rules_of
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import RefusedError, Schema, pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_a_batch_of_more_than_all_images_is_one_of_all_as_on_one_device():
    run = run_of(*SORTS, "batch=64")
    alone, _ = app.build_traced(run.model_dump_json(), Place(torch.device("cpu")), {})
    shard = shard_of("batch=64")
    assert shard.learner.schedule == replace(alone.schedule, images=24, batch=24)
    assert alone.schedule.batch == alone.schedule.images


def push_of(shard, value=1e-3, **meta):
    shapes = {f.name: torch.full(f.shape, value, dtype=f.dtype) for f in shard.pushed.fields}
    heads = shard.learner.task.heads
    values = {"counts": dict.fromkeys(heads, 3.0), "version": 0} | meta
    return pack(shard.pushed, shapes, values)


def refused(shard, message):
    before = {name: t.clone() for name, t in shard.live.items()}
    with pytest.raises(RefusedError, match="worker 1: ") as caught:
        shard.push(message, Slot(0, 1, 2), "worker 1", 3)
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
    for meta in ({"counts": {}}, {"version": -1}, {"version": "x"}, {"version": float("inf")}):
        assert "counts" in refused(shard, push_of(shard, **meta))

    # Its place is filled with nothing: the update is that of the other.
    assert shard.push(push_of(shard), Slot(0, 0, 2), "worker 0", 3)
    applied = shard.apply(0, shard.prepare(0))
    assert shard.version == 1
    assert 0 < applied.norm < 1


def test_an_update_whose_gradients_were_all_refused_changes_nothing():
    shard = shard_of()
    before = {name: t.clone() for name, t in shard.state().items()}
    refused(shard, push_of(shard, float("inf")))
    with pytest.raises(RefusedError):
        shard.push(push_of(shard, float("nan")), Slot(0, 0, 2), "worker 0", 3)
    assert shard.is_complete(Slot(0, 0, 2))
    assert np.isnan(shard.apply(0, shard.prepare(0)).norm)
    assert all(torch.equal(before[name], t) for name, t in shard.state().items())


def test_a_gradient_that_comes_twice_counts_once():
    shard = shard_of("strategy.sync=asp")
    slot = Slot(5, 0, 1)
    assert shard.push(push_of(shard), slot, "worker 0", 3)
    squared = shard.prepare(5)
    shard.apply(5, squared)
    assert shard.already(5) == squared
    assert shard.already(6) is None


def test_pulls_send_what_changed():
    shard = shard_of("freeze=2", "strategy.sync=asp")
    everything = shard.pull(-1)
    assert unpack(everything, shard.pulled)[0].keys() == shard.live.keys()
    assert unpack(shard.pull(0), shard.pulled)[0] == {}
    shard.push(push_of(shard), Slot(0, 0, 1), "worker 0", 3)
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
    shard.push(push_of(shard), Slot(0, 0, 1), "worker 0", 3)
    applied = shard.apply(0, shard.prepare(0))
    assert applied.staleness == late
    for name, t in shard.trained.items():
        assert torch.allclose(before[name] - t, torch.full_like(t, share * 1e-3 / 3))


def test_workers_that_ask_for_the_same_get_the_same_bytes_and_nothing_older():
    shard = shard_of()
    first = shard.pull(-1)
    assert shard.pull(-1) is first
    kept = {name: t.clone() for name, t in unpack(first, shard.pulled)[0].items()}
    shard.push(push_of(shard), Slot(0, 0, 1), "worker 0", 3)
    shard.apply(0, shard.prepare(0))
    tensors, meta = unpack(shard.pull(-1), shard.pulled)
    assert meta["version"] == 1
    assert all(torch.equal(t, shard.live[name]) for name, t in tensors.items())
    # The weights have moved, and what was handed out before has not.
    before = unpack(first, shard.pulled, copy=False)[0]
    assert all(torch.equal(t, kept[name]) for name, t in before.items())
    assert any(not torch.equal(t, kept[name]) for name, t in tensors.items())

    state = {name: torch.zeros_like(t) for name, t in shard.state().items()}
    shard.load(state, {"version": 1, "step": 1, "samples": 6})  # the same version of another past
    loaded = unpack(shard.pull(-1), shard.pulled)[0]
    assert not any(t.any() for t in loaded.values())


@pytest.mark.parametrize(
    "words",
    [
        ["strategy.sync=asp"],
        ["strategy.sync=easgd"],
        ["strategy.compress=fp16"],
        ["strategy.compress=topk"],
        ["strategy.aggregate=median", "strategy.processes=3"],
    ],
)
@pytest.mark.parametrize("places", [1, 2])
def test_nothing_that_is_kept_shares_memory_with_a_message_and_none_is_written_into(words, places):
    shard = shard_of(*words, "optim.clip=1e-3", "optim=sgd", "optim.momentum=0.9")
    messages = [push_of(shard) for _ in range(places)]
    came = [message.copy() for message in messages]
    for place, message in enumerate(messages):
        shard.push(message, Slot(0, place, places), "worker 0", 3)
    shard.apply(0, shard.prepare(0))
    assert all(np.array_equal(a, b) for a, b in zip(messages, came, strict=True))
    kept = shard.state() | shard.gradients()
    before = {name: t.clone() for name, t in kept.items()}
    for message in messages:
        message[:] = 255
    assert all(torch.equal(t, before[name]) for name, t in kept.items())


@pytest.mark.parametrize(
    ("sync", "optimizer", "rate", "share"),
    [
        ("asp", "sgd", 1 / 4, 1 / 4),
        ("ssp", "auto", 1 / 2, 1 / 4),
        ("asp", "muon", 1 / 2, 1 / 4),
        ("bsp", "auto", 1.0, 1.0),
        ("backup", "sgd", 1.0, 1.0),
    ],
)
def test_a_gradient_that_is_an_update_has_the_rate_of_its_share(sync, optimizer, rate, share):
    rules = rules_of(ParameterServer(processes=4, sync=sync), optimizer)
    assert (rules.rate, rules.share) == (rate, share)
