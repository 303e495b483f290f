"""Federated training on Flower, as it is typed: a client's process killed, the run stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal

import pytest
from running import Started, children, epochs, parents, wait_for

ROUNDS = 6
WORDS = (
    "data=digits",
    "task=classify",
    "model=resnet_tiny",
    "model.widths=[4,8,8]",
    "imgsz=32",
    "data.train_images=96",
    "data.val_images=32",
    "batch=8",
    "workers=0",
    "log.plots=false",
    "device=cpu",
    "strategy=federated",
    "strategy.clients=4",
    "strategy.partition=dirichlet",
    f"strategy.rounds={ROUNDS}",
    "strategy.processes=2",
)


@pytest.fixture
def start(tmp_path):
    runs = []

    def started(*words):
        runs.append(Started(tmp_path / f"said-{len(runs)}", *WORDS, *words))
        return runs[-1]

    yield started
    for run in runs:
        run.process.kill()
        run.process.wait(60)


def test_a_run_whose_clients_are_killed_and_that_is_stopped_ends_well(start, tmp_path):
    out = tmp_path / "run"
    process = start(f"out={out}")
    wait_for(lambda: epochs(out) >= 1, process)
    (raylet,) = children(process, "raylet/raylet")
    assert "127.0.0.1:" in re.search(r"--gcs-address=(\S+)", parents()[raylet][1]).group(1)

    before = epochs(out)
    os.kill(random.choice(children(process, "ray::ClientAppActor")), signal.SIGKILL)
    wait_for(lambda: epochs(out) > before + 1, process)
    process.process.send_signal(signal.SIGTERM)
    code, said = process.end()
    assert code == 75, said
    assert "saved at step" in said
    assert not children(process, "ray")

    code, said = start(f"out={out}", "resume=true").end()
    assert code == 0, said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == ROUNDS
    assert metrics["strategy"] == "federated"
    assert metrics["processes"] == 2
    # Of the one that was killed a round is missing, or none if it was just done.
    rounds = [client["rounds"] for client in metrics["clients"].values()]
    assert sum(rounds) >= 4 * ROUNDS - 2
    assert metrics["clients_engine_s"] > 0
    assert 0 <= metrics["worst_client"] <= metrics["mean_client"] <= 1
    assert "SIGTERM handler" not in said
