"""A federated run over TLS: a server, clients in processes and folders of their own, a stranger."""

from __future__ import annotations

import json
import re
import signal
import socket
from http.client import BadStatusLine, HTTPConnection
from pathlib import Path

import pytest
from running import Started, children, epochs, wait_for

from visiontrain.strategies.federated import keys

ROUNDS = 2
SERVER = (
    *("data=digits", "data.val_images=32", "task=classify", "model=resnet_tiny"),
    *("model.widths=[4,8,8]", "imgsz=32", "batch=8", "workers=0", "log.plots=false"),
    *("device=cpu", "strategy.clients=2", f"strategy.rounds={ROUNDS}"),
)
CLIENT = (
    *("data=digits", "data.train_images=48", "data.val_images=16", "data.workers=0"),
    *("device=cpu", "threads=1", "models=resnet_tiny", "max_rounds=5", "min_clients=2"),
)


@pytest.fixture
def start(tmp_path):
    runs = []

    def started(*words):
        runs.append(Started(tmp_path / f"said-{len(runs)}", *words, verb="federated"))
        return runs[-1]

    yield started
    for run in runs:
        run.process.kill()
        run.process.wait(60)


@pytest.fixture
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.timeout(900)  # two minutes where nothing else runs: every message starts a process
def test_clients_with_keys_train_over_tls_through_a_crash_and_a_stranger_does_not(
    start, port, tmp_path
):
    folder, out = tmp_path / "keys", tmp_path / "run"
    keys.make_certificates(folder, [])
    made = {name: keys.make_key(tmp_path / f"{name}.key") for name in ("a", "b", "stranger")}
    for name in ("a", "b"):
        keys.register(made[name], folder)
    words = ("server", *SERVER, f"strategy.keys={folder}", f"strategy.serve=127.0.0.1:{port}")
    server = start(*words, f"out={out}")

    def client(name):
        return start(
            *("client", *CLIENT, f"server=127.0.0.1:{port}", f"ca={folder / keys.CA}"),
            *(f"key={tmp_path / name}.key", f"out={tmp_path / name}"),
        )

    clients = {"a": client("a")}
    code, said = client("stranger").end(400)  # while the server waits for another client
    assert code == 2
    assert f"does not know {tmp_path / 'stranger.key'}" in said
    assert not (tmp_path / "stranger" / "states").exists()
    clients["b"] = client("b")
    wait_for(lambda: epochs(out) >= 1, server, 400)
    plain = HTTPConnection("127.0.0.1", port, timeout=10)
    plain.request("GET", "/health")
    with pytest.raises((BadStatusLine, ConnectionError)):  # it takes no plain text
        plain.getresponse()
    (link,) = children(server, "federated.superlink")
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    wait_for(lambda: not Path(f"/proc/{link}").exists(), clients["a"])

    code, said = start(*words, f"out={out}", "resume=true").end(400)
    assert code == 0, said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == ROUNDS
    assert [metrics["clients"][k]["rounds"] for k in "01"] == [ROUNDS, ROUNDS], said
    assert metrics["samples"] == ROUNDS * 2 * 48
    assert re.search(r"clients may join at 127\.0\.0\.1:\d+: 0 a, 1 b", said)

    for name in ("a", "b"):
        code, said = clients[name].end(400)
        assert code == 0, said
        assert f"train, round {ROUNDS}: done" in said
        assert not children(clients[name], "supernode")
