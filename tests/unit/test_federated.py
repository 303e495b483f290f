"""Federated runs whose clients are calls: what they come to beside one device."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
from collections import Counter

import clients
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import visiontrain as vt
from visiontrain.core.errors import ConfigError, RankError
from visiontrain.strategies import registry

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


@pytest.mark.parametrize("optim", ["adamw", "sgd", "muon"])
def test_one_client_in_one_round_is_one_device_to_the_bit(made, tmp_path, optim):
    alone = vt.train(**SORTS, optim=optim, epochs=3, ema=False, val=False, out=tmp_path / "alone")
    mode = federated(clients=1, rounds=1, local_epochs=3)
    run = vt.train(**SORTS, optim=optim, strategy=mode, out=tmp_path / "run")
    assert gap(weights_of(alone), weights_of(run)) == 0
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


def spoiled(message, name="", value=float("nan"), **meta):
    """Return a client's answer with a number or what goes along changed."""
    head = bytes(message[:12])
    size = int.from_bytes(head[8:], "big")
    header = json.loads(bytes(message[12 : 12 + size]))
    values = message[12 + size :].copy()
    if name:
        values.view(np.float64)[7] = value
    header["meta"] |= meta
    text = json.dumps(header).encode()
    start = head[:8] + len(text).to_bytes(4, "big") + text
    return np.concatenate([np.frombuffer(start, np.uint8), values])


HUGE = 10**400  # JSON has no largest number
FAULTS = {
    "endless counts": (lambda m: spoiled(m, counts={"all": HUGE}), "refused: counts that are none"),
    "endless images": (lambda m: spoiled(m, images=HUGE), "refused: counts that are none"),
    "not finite": (lambda m: spoiled(m, "nan"), "refused: numbers that are not finite"),
    "counts": (lambda m: spoiled(m, counts={"all": -60}), "refused: counts that are none"),
    "heads": (lambda m: spoiled(m, counts={"other": 1}), "refused: counts of other heads"),
    "short": (lambda m: m[:-8], "refused:"),
    "long": (lambda m: np.concatenate([m, np.zeros(10**8, np.uint8)]), "schema allows"),
    "other model": (lambda m: np.frombuffer(b"visiontr\0\0\0\2{}", np.uint8), "refused:"),
    "silent": (lambda m: None, "no result when round 2 was over"),
    "other data": (lambda m: "data: 4 classes here, 10 in the run", "failed: data: 4 classes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_client_that_misbehaves_is_named_and_left_out(monkeypatch, tmp_path, caplog, fault):
    change, said = FAULTS[fault]
    begun = Counter()

    def one_round(client, answer):
        begun[client] += 1
        found = answer()
        # Its hello, its first round, and then this.
        return change(found) if client == 1 and begun[client] == 3 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], one_round))
    mode = federated(clients=3, rounds=3)
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "run")
    (line,) = (record.message for record in caplog.records if "client 1" in record.message)
    assert said in line
    rounds = {k: client["rounds"] for k, client in run.metrics["clients"].items()}
    assert rounds == {"0": 3, "1": 2, "2": 3}
    assert all(torch.isfinite(t).all() for t in weights_of(run).values())


def test_a_client_that_claims_a_billion_images_is_capped(monkeypatch, tmp_path, caplog):
    def boasts(client, answer):
        found = answer()
        meta = {"counts": {"all": 1e9}} if client == 1 else {}
        return spoiled(found, **meta) if len(found) > 2000 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], boasts))
    vt.train(**SORTS, optim="sgd", strategy=federated(clients=3, rounds=1), out=tmp_path / "run")
    assert "client 1: says that it trained on 1e+09 (all); counted as 160" in caplog.text


def test_what_a_client_says_of_itself_breaks_nothing(monkeypatch, tmp_path):
    odd = {"seconds": HUGE, "score": "best", "terms": {"all/cls": HUGE}, "own_images": [3]}

    def babbles(client, answer):
        found = answer()
        return spoiled(found, **odd) if client == 1 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], babbles))
    run = vt.train(**SORTS, strategy=federated(clients=3, rounds=2), out=tmp_path / "run")
    assert run.metrics["clients"]["1"]["common_score"] is None
    assert run.metrics["clients"]["0"]["common_score"] is not None
    assert run.metrics["clients_trained_s"] < 1e6


def never_finite(client, answer):
    found = answer()
    return spoiled(found, "nan") if client == 1 and len(found) > 2000 else found


@pytest.mark.parametrize("algorithm", ["trimmed_mean", "krum", "multi_krum", "bulyan", "median"])
def test_rules_go_on_without_a_client_that_sends_no_numbers(monkeypatch, tmp_path, algorithm):
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], never_finite))
    mode = federated(clients=8, rounds=2, algorithm=algorithm)
    run = vt.train(**SORTS, strategy=mode, out=tmp_path / "run")
    assert all(torch.isfinite(t).all() for t in weights_of(run).values())
    assert run.metrics["clients_refused"] == 2


def test_a_rule_is_not_applied_to_fewer_updates_than_it_needs(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], never_finite))
    mode = federated(clients=3, rounds=2, algorithm="trimmed_mean")
    with pytest.raises(RankError, match="round 1: fewer than 3 results in 3 tries"):
        vt.train(**SORTS, strategy=mode, out=tmp_path / "run")
    assert "2 results of 3 clients, it takes 3; asking again" in caplog.text


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


@pytest.mark.parametrize("keys", [{"local": ["norm"]}, {"algorithm": "scaffold"}])
def test_a_client_that_was_late_again_and_again_comes_back(monkeypatch, tmp_path, keys):
    """What it kept after the last round that counted is still there."""
    begun = Counter()

    def late(client, answer):
        begun[client] += 1
        found = answer()
        return None if client == 1 and 2 < begun[client] < 9 else found  # after its first round

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], late))
    mode = federated(clients=3, rounds=9, **keys)
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "run")
    assert run.metrics["clients_late"] == 6
    assert run.metrics["clients_failed"] == 0
    assert run.metrics["clients"]["1"]["rounds"] == 3
    kept = [int(path.stem) for path in (run.folder / "clients/client-1").glob("*.safetensors")]
    assert min(kept) == 0  # 2 checkpoints back, its newest round was the first
    assert not set(kept) & {*range(1, 7)}


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
