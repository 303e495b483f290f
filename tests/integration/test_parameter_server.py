"""Parameter servers on Ray, as they are typed: killed, stopped, asked by strangers."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys

import pytest
from running import Started, children, epochs, parents, wait_for
from safetensors.torch import load_file

from visiontrain.cli import main

EPOCHS = 14
SORTS = (
    "data=digits",
    "task=classify",
    "model=resnet_tiny",
    "model.widths=[4,8,8]",
    "model.norm=group",
    "imgsz=32",
    "data.train_images=96",
    "data.val_images=16",
    "batch=8",
    f"epochs={EPOCHS}",
    "precision=fp64",
    "workers=0",
    "log.plots=false",
    "device=cpu",
)
SERVERS = ("strategy=parameter_server", "strategy.servers=2", "strategy.snapshot_every=7")
STRANGER = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1])
except Exception as error:
    sys.exit(str(error))
print("JOINED")
"""


@pytest.fixture
def start(tmp_path):
    runs = []

    def started(*words):
        runs.append(Started(tmp_path / f"said-{len(runs)}", *SORTS, *words))
        return runs[-1]

    yield started
    for run in runs:
        run.process.kill()
        run.process.wait(60)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    assert main(["train", *SORTS, f"out={out}"]) == 0
    return load_file(out / "weights" / "last.safetensors")


def gap(weights, out):
    mine = load_file(out / "weights" / "last.safetensors")
    assert mine.keys() == weights.keys()
    return max((weights[n].double() - t.double()).abs().max().item() for n, t in mine.items())


def test_killed_workers_and_servers_cost_nothing_and_strangers_stay_out(start, tmp_path, alone):
    out, draw = tmp_path / "run", random.Random()
    process = start(f"out={out}", *SERVERS, "strategy.max_restarts=10")
    wait_for(lambda: epochs(out) >= 1, process)

    (raylet,) = children(process, "raylet/raylet")
    address = re.search(r"--gcs-address=(\S+)", parents()[raylet][1]).group(1)
    assert address.startswith("127.0.0.1:")
    for token in ({"RAY_AUTH_TOKEN": "0" * 64, "RAY_AUTH_MODE": "token"}, {}):
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
        command = [sys.executable, "-c", STRANGER, address]
        asked = subprocess.run(
            command, check=False, env=plain | token, capture_output=True, text=True
        )
        assert asked.returncode == 1, asked.stdout
        assert "InvalidAuthToken" in asked.stderr

    for kind in ("ray::ServerActor", "ray::WorkerActor"):
        before = epochs(out)
        pid = draw.choice(wait_for(lambda kind=kind: children(process, kind), process))
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda before=before: epochs(out) > before + 1, process)
    code, said = process.end()

    assert code == 0, said
    assert "restart 2 of 10" in said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["restarts"] == 2
    assert metrics["steps"] == EPOCHS * 12
    assert metrics["processes"] == 2
    assert not (out / "servers").exists()
    assert gap(alone, out) < 1e-6
    assert not children(process, "ray")


def test_a_stopped_run_goes_on_with_one_device(start, tmp_path, alone):
    out = tmp_path / "run"
    process = start(f"out={out}", *SERVERS)
    wait_for(lambda: epochs(out) >= 2, process)
    process.process.send_signal(signal.SIGTERM)
    code, said = process.end()

    assert code == 75, said
    assert "saved at step" in said
    with (out / "results.csv").open() as file:
        assert "staleness" in next(csv.reader(file))
    assert main(["train", *SORTS, f"out={out}", "resume=true", "strategy=single"]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["samples"] == EPOCHS * 96
    assert gap(alone, out) < 1e-6


def test_a_killed_hub_ends_the_run_which_goes_on_from_what_was_saved(start, tmp_path, alone):
    out = tmp_path / "run"
    process = start(f"out={out}", *SERVERS)
    wait_for(lambda: epochs(out) >= 2, process)
    (pid,) = wait_for(lambda: children(process, "ray::Hub"), process)
    os.kill(pid, signal.SIGKILL)
    code, said = process.end()

    assert code == 1, said
    assert said.splitlines()[-1].startswith("visiontrain: hub: ended without a word; ")
    assert "Traceback" not in said
    assert "restart" not in said
    code, said = start(f"out={out}", "resume=true", "strategy=single").end()
    assert code == 0, said
    assert json.loads((out / "metrics.json").read_text())["samples"] == EPOCHS * 96
    assert gap(alone, out) < 1e-6


@pytest.mark.parametrize("address", ["127.0.0.1:1", "foo"])
def test_an_address_where_nothing_answers_is_said(start, tmp_path, address):
    words = ("strategy=parameter_server", f"strategy.address={address}")
    code, said = start(f"out={tmp_path / 'run'}", *words).end()
    assert code == 2, said
    assert f"strategy.address: {address}; no Ray answers at such a HOST:PORT" in said
