"""Federated runs whose clients misbehave, fail or are late: what is said, and what it comes to."""

from __future__ import annotations

import json
import re
import time
from collections import Counter

import clients
import numpy as np
import pytest
import torch
from test_federated import SORTS, federated, gap, weights_of

import visiontrain as vt
from visiontrain.core.errors import RankError
from visiontrain.strategies import registry


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


def below_zero(message):
    """Return a client's answer whose numbers are all below zero, variances among them."""
    start = 12 + int.from_bytes(bytes(message[8:12]), "big")
    values = np.full(len(message[start:]) // 8, -1.0)
    return np.concatenate([message[:start], values.view(np.uint8)])


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


def test_waiting_for_clients_that_start_is_no_training(monkeypatch, tmp_path):
    ended = []

    def starts(client, answer):
        found = answer()
        if not ended:  # hello
            time.sleep(1)
        ended.append(time.monotonic())
        return found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], starts))
    keys = SORTS | {"strategy": federated(clients=1, rounds=3), "out": tmp_path / "run"}
    found = vt.train(**keys).metrics
    trained = found["samples"] / found["train_images_per_s"]
    assert trained < ended[-1] - ended[0] + 0.5
    assert found["seconds"] - trained < time.monotonic() - ended[0]


@pytest.mark.parametrize("local", [[], ["norm"]])
def test_a_round_that_comes_again_is_what_it_was(monkeypatch, tmp_path, caplog, local):
    """With the same clients, who may only be slow, and who may have kept parts of their own."""
    mode = federated(clients=5, rounds=3, fraction=0.6, algorithm="median", local=local)
    keys = SORTS | {"optim": "sgd", "strategy": mode}
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))
    whole = vt.train(**keys, out=tmp_path / "whole")
    begun = Counter()

    def late(client, answer):
        begun[client] += 1
        found = answer()
        return None if client == 1 and begun[client] == 2 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], late))
    run = vt.train(**keys, out=tmp_path / "run")
    assert "2 results of 3 clients, it takes 3; asking again" in caplog.text
    assert gap(weights_of(whole), weights_of(run)) == 0


@pytest.mark.parametrize("answers", ["data: none here", None, "nan"])
def test_others_take_the_place_of_a_client_that_makes_nothing(monkeypatch, tmp_path, answers):
    def spoils(client, answer):
        found = answer()
        if client != 1 or len(found) < 2000:  # it says hello, too
            return found
        return spoiled(found, "nan") if answers == "nan" else answers

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], spoils))
    mode = federated(clients=5, rounds=4, fraction=0.6, algorithm="median")
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "run")
    rounds = {k: client["rounds"] for k, client in run.metrics["clients"].items()}
    assert sum(rounds.values()) == 4 * 3
    assert rounds["1"] == 0


def test_a_client_that_is_slow_to_say_hello_takes_part_later(monkeypatch, tmp_path, caplog):
    begun = Counter()

    def slow(client, answer):
        begun[client] += 1
        return None if client == 1 and begun[client] == 1 else answer()

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], slow))
    run = vt.train(**SORTS, strategy=federated(clients=3, rounds=3), out=tmp_path / "run")
    assert "client 1: left out: no answer in 600 s" in caplog.text
    assert run.metrics["clients"]["1"]["rounds"] == 2


def test_a_variance_below_zero_is_refused(monkeypatch, tmp_path, caplog):
    def lies(client, answer):
        found = answer()
        return below_zero(found) if client == 1 and len(found) > 2000 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], lies))
    keys = SORTS | {"model": {"kind": "resnet_tiny", "widths": [4, 8, 8], "norm": "batch"}}
    run = vt.train(**keys, strategy=federated(clients=3, rounds=1), out=tmp_path / "run")
    assert re.search(r"client 1: refused: .*running_var: a variance below zero", caplog.text)
    assert run.metrics["clients"]["1"]["rounds"] == 0


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


def test_a_client_that_goes_much_too_far_is_cut(monkeypatch, tmp_path, caplog):
    def jumps(client, answer):
        found = answer()
        return spoiled(found, "far", 1e12) if client == 1 and len(found) > 2000 else found

    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], jumps))
    mode = federated(clients=3, rounds=1)
    run = vt.train(**SORTS, optim="sgd", strategy=mode, out=tmp_path / "run")
    assert re.search(r"client 1: its update cut to \S+ of its length", caplog.text)
    assert max(float(t.abs().max()) for t in weights_of(run).values()) < 1000
