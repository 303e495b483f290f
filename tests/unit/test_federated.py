"""Federated runs whose clients are calls: what they come to beside one device."""

from __future__ import annotations

import csv
import os
import re
import signal
from collections import Counter

import clients
import pytest
import torch
from safetensors.torch import load_file

import visiontrain as vt
from visiontrain.core.errors import ConfigError, Stopped
from visiontrain.core.types import Loss
from visiontrain.strategies import registry
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.federated import algorithms
from visiontrain.strategies.federated.algorithms import FedAvg
from visiontrain.strategies.federated.messages import read_meta
from visiontrain.strategies.federated.server import NEW_ALGORITHM

SORTS = {
    "data": "digits",
    "task": "classify",
    "model": {"kind": "resnet_tiny", "widths": [4, 8, 8], "norm": "group"},
    "imgsz": 32,
    "data.train_images": 48,
    "data.val_images": 16,
    "batch": 8,
    "precision": "fp64",
    "workers": 0,
    "device": "cpu",
    "log": {"plots": False, "to": []},
}
FINDS = {
    "data": "tiny",
    "model": {"kind": "yolo_n", "norm": "group"},
    "imgsz": 64,
    "data.train_images": 24,
    "data.val_images": 3,
    "batch": 6,
    "precision": "fp64",
    "workers": 0,
    "device": "cpu",
    "log": {"plots": False, "to": []},
}


@pytest.fixture
def made(monkeypatch):
    servers = []
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of(servers))
    return servers


def weights_of(run):
    return load_file(run.folder / "weights" / "last.safetensors")


def gap(a, b):
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a)


def federated(**keys):
    return {"kind": "federated", **keys}


@pytest.mark.parametrize(
    ("optim", "norm"), [("adamw", "group"), ("sgd", "batch"), ("muon", "group")]
)
def test_one_client_in_one_round_is_one_device_to_the_bit(made, tmp_path, optim, norm):
    keys = SORTS | {"optim": optim, "model": SORTS["model"] | {"norm": norm}}
    alone = vt.train(**keys, epochs=3, ema=False, val=False, out=tmp_path / "alone")
    mode = federated(clients=1, rounds=1, local_epochs=3)
    run = vt.train(**keys, strategy=mode, out=tmp_path / "run")
    wanted, found = weights_of(alone), weights_of(run)
    counters = {n for n, t in wanted.items() if not t.is_floating_point()}  # of steps: no use here
    assert bool(counters) == (norm == "batch")
    assert gap(*({n: t for n, t in w.items() if n not in counters} for w in (wanted, found))) == 0
    assert run.metrics["samples"] == alone.metrics["samples"] == 3 * 48
    assert run.metrics["top1"] == alone.metrics["top1"]
    with (run.folder / "results.csv").open() as file:
        (row,) = csv.DictReader(file)  # its one round of three epochs
    assert float(row["images_per_s"]) == pytest.approx(run.metrics["train_images_per_s"], rel=1e-3)


PLAIN = {
    "augment": "none",
    "optim": {"kind": "sgd", "lr": 0.05, "momentum": 0.0, "clip": 1e9, "warmup": 0},
    "epochs": 1,
    "ema": False,
}


@pytest.mark.parametrize("base", [SORTS, FINDS], ids=["classify", "detect"])
def test_a_full_batch_step_on_each_client_is_one_on_all_their_images(made, tmp_path, base):
    keys = base | PLAIN | {"batch": base["data.train_images"]}
    alone = vt.train(**keys, out=tmp_path / "alone")
    mode = federated(clients=2, rounds=1, partition="quantity", alpha=1.0)
    run = vt.train(**keys | {"epochs": 1}, strategy=mode, out=tmp_path / "run")
    first = load_file(next((tmp_path / "run" / "checkpoints").glob("step-*0/model.safetensors")))
    moved = gap(weights_of(alone), first)
    assert gap(weights_of(alone), weights_of(run)) < 1e-12 < moved
    sizes = {client["images"] for client in run.metrics["clients"].values()}
    assert len(sizes) > 1  # else equal weights would do


KEPT = {
    "fedadam": {"server_lr": 0.1},
    "scaffold": {},
    "fedavgm": {"server_lr": 0.5},
    "fedavg": {"local": ["norm"]},
    "fedprox": {"prox": 0.5},
    "fednova": {"partition": "quantity"},
}


@pytest.mark.parametrize("algorithm", KEPT)
def test_a_server_that_dies_goes_on_to_the_bit(monkeypatch, tmp_path, algorithm):
    mode = federated(clients=3, rounds=4, fraction=0.67, algorithm=algorithm, **KEPT[algorithm])
    keys = SORTS | {"optim": "sgd", "strategy": mode}
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = vt.train(**keys, out=tmp_path / "whole")

    asked = []

    def dies(client, answer):
        asked.append(client)
        if len(asked) == 10:  # three said hello, two a round trained: amid the fourth
            raise KeyboardInterrupt
        return answer()

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], dies))
    with pytest.raises(KeyboardInterrupt):
        vt.train(**keys, out=tmp_path / "killed")
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    run = vt.train(out=tmp_path / "killed", resume=True)
    assert gap(weights_of(whole), weights_of(run)) == 0
    assert run.metrics["clients"] == whole.metrics["clients"]
    # What clients say beside their weights is a number's digits longer or shorter.
    assert run.metrics["clients_up"] == pytest.approx(whole.metrics["clients_up"], rel=1e-3)


def test_norms_that_stay_are_each_client_s_own_and_statistics_with_them(made, tmp_path):
    keys = SORTS | {"optim": "sgd", "model": SORTS["model"] | {"norm": "batch"}}
    mode = federated(clients=2, rounds=2, local=["norm"])
    run = vt.train(**keys, strategy=mode, out=tmp_path / "run")
    kept = [load_file(run.folder / f"clients/client-{k}/000001.safetensors") for k in (0, 1)]
    assert kept[0].keys() == kept[1].keys()
    means = [name for name in kept[0] if name.endswith("running_mean")]
    assert means
    server = weights_of(run)
    for name in means:
        assert gap({name: kept[0][name]}, {name: kept[1][name]}) > 1e-3
        assert not server[name.removeprefix("weight/")].any()  # it saw no image
    shared = federated(clients=2, rounds=2)
    averaged = weights_of(vt.train(**keys, strategy=shared, out=tmp_path / "shared"))
    assert all(averaged[name.removeprefix("weight/")].any() for name in means)


def test_a_server_that_is_to_stop_amid_a_round_does_not_wait_for_its_end(monkeypatch, tmp_path):
    keys = SORTS | {"optim": "sgd", "strategy": federated(clients=3, rounds=3)}
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = vt.train(**keys, out=tmp_path / "whole")
    asked = []

    def stops(client, answer):
        asked.append(client)
        if len(asked) == 8:  # three said hello, three trained: amid the second
            os.kill(os.getpid(), signal.SIGTERM)
        return answer()

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], stops))
    stopped = vt.train(**keys, out=tmp_path / "stopped")
    assert stopped.exit_code == 75
    assert len((tmp_path / "stopped" / "results.csv").read_text().splitlines()) == 2
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    run = vt.train(out=tmp_path / "stopped", resume=True)
    assert gap(weights_of(whole), weights_of(run)) == 0


def test_a_server_that_is_to_stop_amid_scores_by_clients_repeats_no_round(monkeypatch, tmp_path):
    keys = SORTS | {"optim": "sgd", "strategy": federated(clients=2, rounds=3, score_every=1)}
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = vt.train(**keys, out=tmp_path / "whole")

    class Ends(clients.Calls):  # as the link of a deployment does
        def ask(self, messages, seconds, enough):
            if messages and read_meta(next(iter(messages.values())))["kind"] == "score":
                os.kill(os.getpid(), signal.SIGTERM)
                raise Stopped
            return super().ask(messages, seconds, enough)

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], kind=Ends))
    stopped = vt.train(**keys, out=tmp_path / "stopped")
    assert stopped.exit_code == 75
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    run = vt.train(out=tmp_path / "stopped", resume=True)
    assert run.metrics["steps"] == 3
    assert gap(weights_of(whole), weights_of(run)) == 0


def test_algorithms_come_to_different_weights(made, tmp_path):
    found = {}
    for algorithm, keys in KEPT.items():
        same = {"partition": "quantity"} if algorithm != "fedavg" else {}
        mode = federated(clients=3, rounds=3, algorithm=algorithm, **keys | same)
        run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / algorithm)
        found[algorithm] = weights_of(run)
    mode = federated(clients=3, rounds=3, partition="quantity")
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "plain")
    found["plain"] = weights_of(run)
    names = list(found)
    for place, name in enumerate(names):
        for other in names[:place]:
            assert gap(found[name], found[other]) > 1e-6, (name, other)


@pytest.mark.parametrize("keys", [{"patience": 1}, {"patience": 0}])
def test_clients_score_the_weights_that_a_run_reports(made, tmp_path, keys):
    """However it ended: their images of `val` are all of them, in equal parts."""
    rise = {"kind": "sgd", "lr": 5.0, "warmup": 0, "schedule": "constant", "clip": 1e9}
    mode = federated(clients=2, rounds=4)
    run = vt.train(**SORTS | keys, optim=rise, strategy=mode, out=tmp_path / "run")
    assert run.metrics["epochs"] == (4 if not keys["patience"] else run.metrics["best_epoch"] + 1)
    assert run.metrics["best_epoch"] < run.metrics["epochs"]
    assert run.metrics["mean_client"] == pytest.approx(run.metrics["top1"])


def test_a_step_that_is_no_number_is_not_in_the_loss(made, monkeypatch, tmp_path):
    real, calls = Strategy.forward_backward, []

    def breaks(self, learner, micro_batches):
        loss = real(self, learner, micro_batches)
        calls.append(1)
        odd = len(calls) == 2
        nan = {name: term * float("nan") for name, term in loss.terms.items()}
        return Loss(nan, loss.counts) if odd else loss

    monkeypatch.setattr(Strategy, "forward_backward", breaks)
    run = vt.train(**SORTS, strategy=federated(clients=2, rounds=1), out=tmp_path / "run")
    with (run.folder / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert len(calls) == 6
    assert 2.0 < float(row["train/all/cls"]) < 2.6  # of ten classes: ln 10 is 2.3


def test_a_variate_is_the_gradient_of_its_client_s_images(monkeypatch, tmp_path):
    """After one full batch of plain SGD, whatever correction the step had (option II of eq. 4)."""
    keys = SORTS | PLAIN | {"batch": SORTS["data.train_images"], "save": {"every_epochs": 1}}
    del keys["epochs"]
    dealt = {"clients": 2, "partition": "quantity", "alpha": 1.0}
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = federated(rounds=2, algorithm="scaffold", **dealt)
    corrected = vt.train(**keys, strategy=whole, out=tmp_path / "corrected")
    first = federated(rounds=1, algorithm="scaffold", **dealt)
    before = vt.train(**keys, strategy=first, out=tmp_path / "first")
    updates = []

    class Watched(FedAvg):
        def step(self, now, found, head_of):
            updates.extend((dict(now), update) for update in found)
            return super().step(now, found, head_of)

    monkeypatch.setattr(algorithms, "FedAvg", Watched)
    weights = before.folder / "weights" / "last.safetensors"
    vt.train(**keys, weights=weights, strategy=federated(rounds=1, **dealt), out=tmp_path / "plain")
    assert [update.client for _, update in updates] == [0, 1]
    for now, update in updates:
        folder = corrected.folder / "clients" / f"client-{update.client}"
        kept = load_file(folder / "000001.safetensors")
        variates = [name for name in kept if name.startswith("control/")]
        assert variates
        for name in variates:
            own = name.removeprefix("control/")
            gradient = (now[own] - update.weights[own]) / PLAIN["optim"]["lr"]
            torch.testing.assert_close(kept[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keys", [{"local": ["norm"]}, {"algorithm": "scaffold"}])
def test_a_server_may_go_back_several_rounds(monkeypatch, tmp_path, keys):
    whole_keys = SORTS | {"optim": "sgd", "save": {"every_epochs": 3}}
    mode = federated(clients=2, rounds=7, **keys)
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = vt.train(**whole_keys, strategy=mode, out=tmp_path / "whole")
    asked = []

    def dies(client, answer):
        asked.append(client)
        if len(asked) == 13:  # amid the sixth round: two said hello
            raise KeyboardInterrupt
        return answer()

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], dies))
    with pytest.raises(KeyboardInterrupt):
        vt.train(**whole_keys, strategy=mode, out=tmp_path / "killed")
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    run = vt.train(out=tmp_path / "killed", resume=True)
    assert gap(weights_of(whole), weights_of(run)) == 0


def test_variates_add_up_whoever_was_late(monkeypatch, tmp_path):
    begun, servers = Counter(), []

    def late(client, answer):
        begun[client] += 1
        found = answer()
        return None if begun[client] == 2 + client else found  # in another round each

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of(servers, late))
    mode = federated(clients=3, rounds=5, algorithm="scaffold")
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "run")
    assert run.metrics["clients_late"] == 3
    (server,) = servers
    kept = []
    for client, own in run.metrics["clients"].items():
        folder = run.folder / "clients" / f"client-{client}"
        kept.append(load_file(folder / f"{own['newest_round']:06d}.safetensors"))
    for name, control in server.algorithm.control.items():
        mean = sum(state[f"control/{name}"] for state in kept) / 3
        torch.testing.assert_close(control, mean, rtol=0, atol=1e-12)
        assert control.abs().max() > 0


def test_moments_of_another_algorithm_are_left_out(made, tmp_path):
    """Also where they have the same names."""
    given = SORTS | {"optim": "sgd", "out": tmp_path / "run"}
    vt.train(**given, strategy=federated(clients=2, rounds=1, algorithm="fedadam"))
    kept = made[-1].collect_own({})
    vt.train(
        **given | {"out": tmp_path / "other"},
        strategy=federated(clients=2, rounds=1, algorithm="fedyogi"),
    )
    other = made[-1]
    assert other.load_own(kept, {}) == NEW_ALGORITHM
    assert other.load_own(other.collect_own({}), {}) is None


@pytest.mark.parametrize("first", ["fedavg", "scaffold"])
def test_another_algorithm_goes_on_from_the_weights_alone(made, tmp_path, first):
    given = SORTS | {"optim": "sgd", "out": tmp_path / "run"}
    vt.train(**given, strategy=federated(clients=2, rounds=2, algorithm=first))
    again = {"out": tmp_path / "run", "resume": True}
    vt.train(**again, epochs=3, strategy={"algorithm": "fedavg"})
    run = vt.train(**again, epochs=5, strategy={"algorithm": "scaffold"})
    assert run.metrics["steps"] == 5
    assert run.metrics["clients_failed"] == 0
    server = made[-1]  # which may roll back, to a checkpoint of its own: nothing is forgotten then
    kept, state = dict(server.figures.newest), server.collect_own({})
    assert server.load_own(state, {}) is None
    server.load_summary(server.summary())
    assert server.figures.newest == kept != {}


def test_a_run_goes_on_with_more_rounds_and_not_with_other_clients(made, tmp_path):
    vt.train(**SORTS, strategy=federated(clients=2, rounds=2), out=tmp_path / "run")
    run = vt.train(out=tmp_path / "run", resume=True, epochs=3)
    assert run.metrics["steps"] == 3
    with pytest.raises(ConfigError, match=re.escape("strategy.clients: 3, but the run has 2")):
        vt.train(out=tmp_path / "run", resume=True, strategy={"clients": 3})
    with pytest.raises(ConfigError, match="steps of one are rounds of the other"):
        vt.train(out=tmp_path / "run", resume=True, strategy={"kind": "single"})


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ({"alpha": 0.1}, "strategy.alpha: 0.1; it changes nothing here, add strategy.partition"),
        ({"algorithm": "krum", "clients": 3}, "krum of 3 clients, 1 of them faulty; it takes 4"),
        ({"algorithm": "bulyan", "clients": 6}, "it takes 7 or more"),
        ({"clients": 100}, "strategy.clients: 100, of 48 images"),
        ({"min_fit": 5}, "strategy.min_fit: 5; 4 clients are asked"),
        ({"algorithm": "fednova", "server_lr": 0.5}, "strategy.server_lr: 0.5"),
        ({"rounds": 3, "local_epochs": 2}, "epochs: 4, but strategy.rounds=3 of 2 are 6"),
        ({"local_epochs": 3}, "strategy.local_epochs: 3 of 4 epochs"),
        ({"partition": "source", "clients": 2}, "images lie in"),
        ({"partition": "classes", "classes": 11}, "strategy.classes: 11; the data has 10"),
        ({"local": ["head", "backbone"]}, "nothing would travel"),
        ({"algorithm": "multi_krum", "chosen": 4}, "strategy.chosen: 4 of 4 clients, 1 of them"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(made, tmp_path, mode, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        vt.train(**SORTS, epochs=4, strategy=federated(**mode), out=tmp_path / "run")
    assert not (tmp_path / "run" / "results.csv").exists()
