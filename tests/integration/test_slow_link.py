"""`tools/slow_link`: a link that the kernel shapes, where root may have one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visiontrain.strategies.shaped import (
    PREFIX,
    NotMeasuredError,
    ended,
    linked,
    refusal,
    remove,
    sweep,
)

TOOL = Path(__file__).resolve().parents[2] / "tools" / "slow_link"
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


def namespaces():
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith(PREFIX)]


@pytest.fixture
def rights():
    """Skip where there can be no such link."""
    try:
        with linked("100mbit"):
            pass
    except NotMeasuredError as error:
        pytest.skip(str(error))


def slow_link(*words):
    command = [sys.executable, str(TOOL), *words]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)


def test_both_ends_measure_what_the_kernel_lets_through(rights):
    with linked("20mbit") as hosts:
        mine = {host.namespace for host in hosts}
        assert mine <= set(namespaces())
        module, address = "visiontrain.strategies.probe", hosts[0].address
        started = {
            "one": hosts[0].start(module, ["serve", address]),
            "other": hosts[1].start(module, ["ask", address]),
        }
        found = json.loads(ended(started)["other"])
    # Headers, acknowledgements and a busy machine take a part, a full bucket adds one.
    assert 0.5 * 2.5e6 < found["bandwidth"] < 1.05 * 2.5e6
    assert 0 < found["latency"] < 0.1
    assert not mine & set(namespaces())


def test_hosts_go_with_what_went_wrong_and_those_of_a_killed_process_later(rights):
    with pytest.raises(KeyboardInterrupt), linked("20mbit") as hosts:
        waiting = hosts[0].start("http.server", ["--bind", hosts[0].address, "8000"])
        raise KeyboardInterrupt
    waiting.communicate(timeout=30)
    assert waiting.returncode
    assert not {host.namespace for host in hosts} & set(namespaces())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = f"{PREFIX}-{gone.pid}-1"
    subprocess.run(["ip", "netns", "add", left], check=True)
    try:
        sweep()
        assert left not in namespaces()
    finally:
        remove(left)


@pytest.mark.parametrize(
    "mode",
    ["ddp", pytest.param("federated", marks=pytest.mark.slow)],  # in five processes
)
def test_a_mode_is_measured_beside_its_prediction(rights, mode):
    words = ["model=resnet_tiny", "model.widths=[8,16,32]", "task=classify", "imgsz=32"]
    done = slow_link("50mbit", "--modes", mode, "--quick", "data=digits", *words)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["mode"] == mode
    assert row["bytes_per_s"] < 1.05 * 6.25e6
    assert row["measured_s"] > 0
    assert row["predicted_s"] > row["alone_s"]
    assert row["bytes"] == pytest.approx(row["predicted_bytes"], rel=0.01)


def test_without_rights_nothing_is_measured_and_it_says_why(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert refusal() in ("network namespaces and tc need root", "network namespaces are Linux's")
    with pytest.raises(NotMeasuredError, match="network namespaces"), linked("10mbit"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="cannot give up rights that are not there")
def test_the_tool_as_nobody_ends_well(tmp_path):
    program = "import os, runpy, sys; os.geteuid = lambda: 1000; sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(TOOL), "10mbit"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "need root" in json.loads(done.stdout)["not_measured"]
