"""Starting processes: from any script, with exit codes, errors and signals brought back."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import entries
import pytest
import torch

from visiontrain.core.errors import ConfigError, DataError, RankError
from visiontrain.strategies.config import DDP, Single
from visiontrain.strategies.devices import devices, settle
from visiontrain.strategies.launch import run

# A user's script: no main guard, and it would run away if a process imported it again.
SCRIPT = """
import entries
from visiontrain.strategies.config import DDP
from visiontrain.strategies.launch import run
code = run(DDP(processes=2, threads=1), "cpu", entries.{entry}, "{text}")
print("code", code, flush=True)
"""
SMALL = ["data=tiny", "data.train_images=6", "imgsz=64", "batch=3", "epochs=1", "device=cpu"]
SMALL += ["augment=none"]
TWO = DDP(processes=2, threads=1)
ONCE = DDP(processes=2, threads=1, max_restarts=0)
GPUS = [torch.device("cuda", 0), torch.device("cuda", 1)]


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script which calls `run` with an entry."""
    started = []

    def popen(entry, text="1", **env):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT.format(entry=entry, text=text))
        paths = os.pathsep.join(p for p in sys.path if p)
        process = subprocess.Popen(
            [sys.executable, str(path)],
            env=os.environ | {"PYTHONPATH": paths} | env,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield popen
    for process in started:
        process.kill()
        process.communicate()


def ready(process):
    """Wait until both workers run; return their process ids."""
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def told(caplog):
    """Return what the launcher said."""
    return [record.message for record in caplog.records if record.name == run.__module__]


def test_a_script_without_a_main_guard_gets_the_exit_code(start):
    out, error = start("agree", "75").communicate()
    assert (out, error) == ("code 75\n", "")


def test_a_bug_on_a_rank_is_named_with_its_traceback():
    with pytest.raises(RankError) as caught:
        run(ONCE, "cpu", entries.crash, "bug")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("rank 1 of 2: KeyError: ")
    assert "in crash" in "\n".join(rest)
    assert rest[-1].startswith("KeyError")


def test_a_bug_would_be_one_again_and_is_not_tried_again(caplog):
    with pytest.raises(RankError, match=r"^rank 1 of 2: KeyError: "):
        run(TWO, "cpu", entries.crash, "bug")
    assert told(caplog) == []


def test_an_error_for_the_user_arrives_as_it_was_and_at_once(caplog):
    with pytest.raises(DataError, match=r"^data: empty; give some$"):
        run(TWO, "cpu", entries.crash, "user")
    assert told(caplog) == []  # of no restart


def test_a_rank_that_is_killed_each_time_is_named_after_the_last_restart(caplog):
    with pytest.raises(RankError, match=r"^rank 1 of 2: ended by SIGKILL"):
        run(DDP(processes=2, threads=1, max_restarts=1), "cpu", entries.crash, "kill")
    first = "restart 1 of 1, as rank 1 of 2: ended by SIGKILL; was memory short?"
    assert told(caplog) == [first]


def test_signals_reach_all_processes_whose_code_comes_back(start):
    process = start("wait", "3")
    ready(process)
    for name in ("SIGUSR1", "SIGINT", "SIGTERM"):
        process.send_signal(getattr(signal, name))
        assert [process.stdout.readline() for _ in range(2)] == [f"got {name}\n"] * 2
    assert process.communicate() == ("code 75\n", "")  # which saved: not 143


def test_a_signal_before_there_is_anything_to_save(start, tmp_path):
    process = start("wait", TMPDIR=str(tmp_path))
    while not list(tmp_path.glob("visiontrain-*/pid-*")):  # the first worker is starting
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert out.splitlines()[-1] in ("code 143", "code 75")  # 75 where both were quick


def test_workers_end_with_their_parent_and_leave_nothing(start, tmp_path):
    process = start("wait", TMPDIR=str(tmp_path))
    workers = ready(process)
    process.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list(tmp_path.glob("visiontrain-*")) == []


def test_torchrun_is_joined(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    out, error = start("agree", "5", MASTER_PORT=port, OMP_NUM_THREADS="1", **env).communicate()
    assert out == "code 5\n", error


def torchrun(*words, out):
    """Start two processes of the program, as its users do; return (exit code, stdout, stderr)."""
    command = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "visiontrain", "train", *SMALL, *words],
        cwd=out,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_torchrun_trains_one_run_with_as_many_processes_as_it_starts(tmp_path):
    code, out, error = torchrun("strategy=ddp", "log.plots=false", out=tmp_path)
    assert code == 0, error
    assert out.count("results: ") == 1
    (folder,) = (tmp_path / "runs" / "detect").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["processes"] == 2
    assert "processes: 2" in (folder / "config.yaml").read_text()


def test_processes_started_by_hand_train_one_run(tmp_path):
    """As srun starts them: nobody but rank 0 can hold the store that they meet in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    many = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join(p for p in sys.path if p)
    command = [sys.executable, "-m", "visiontrain", "train", *SMALL, "strategy=ddp"]
    ranks = [
        subprocess.Popen(
            [*command, "log.plots=false"],
            cwd=tmp_path,
            env=os.environ | many | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": path},
        )
        for rank in ("1", "0")
    ]
    assert [rank.wait() for rank in ranks] == [0, 0]
    (folder,) = (tmp_path / "runs" / "detect").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["processes"] == 2


def by_hand(path, script, world, tmp_path):
    """Start `world` processes of a script as srun does; return what each printed, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    (tmp_path / "script.py").write_text(script)
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "script.py")],
            env=os.environ | env | {"RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    return [process.communicate()[0] for process in processes]


SLOW = """
import os, time
import entries
from visiontrain.strategies import member
from visiontrain.strategies.config import DDP
if os.environ["RANK"] == "2":
    time.sleep(3)
text = member.once("five", lambda _: "5")
print("code", member.join(DDP(timeout_s=30), "cpu", entries.agree, text, {}))
"""


def test_processes_started_by_hand_wait_for_a_slow_one(tmp_path):
    path = os.pathsep.join(p for p in sys.path if p)
    assert by_hand(path, SLOW, 3, tmp_path) == ["code 5\n"] * 3


def test_torchrun_is_told_once_per_process_what_cannot_be(tmp_path):
    code, _, error = torchrun("strategy=ddp", "strategy.processes=3", out=tmp_path)
    assert code != 0
    line = "visiontrain: strategy.processes: 3; torchrun started 2 here, leave it out"
    assert error.splitlines().count(line) in (1, 2)  # one may be ended by the other's end
    assert 'Traceback (most recent call last):\n  File "<' not in error.split(line)[0]
    assert not (tmp_path / "runs").exists()


def test_a_mode_is_checked_against_the_machine(monkeypatch):
    settled = settle(DDP(threads=1), "cpu")
    assert settled.processes == 2
    with pytest.raises(ConfigError, match=r"^device: '0,1'; torch sees "):
        settle(Single(), "0,1")
    monkeypatch.setattr("visiontrain.strategies.devices.devices", lambda _: GPUS)
    with pytest.raises(ConfigError, match=r"^device: '0,1'; strategy=single takes one"):
        settle(Single(), "0,1")
    with pytest.raises(ConfigError, match=r"^strategy.processes: 3; device=0,1 is 2 GPUs"):
        settle(DDP(processes=3), "0,1")
    monkeypatch.setattr("visiontrain.strategies.devices.devices", lambda _: GPUS * 2)
    assert settle(DDP(threads=1), "0,1,2,3").processes == 4
    assert settle(DDP(processes=2), "cuda").processes == 2
    with pytest.raises(ConfigError, match=r"^strategy.processes: 2; device=0,1,2,3 names 4 GPUs"):
        settle(DDP(processes=2), "0,1,2,3")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "node1")
    assert settle(DDP(threads=1), "0,1").processes == 2
    assert settle(DDP(processes=2), "0,1").processes == 2
    with pytest.raises(ConfigError, match=r"^strategy: single under torchrun; "):
        settle(Single(), "cpu")


def test_devices():
    found = torch.cuda.device_count()
    assert devices("cpu") == [torch.device("cpu")]
    assert len(devices("auto")) == max(1, found)
    for text in ("gpu", "0,x", "", "cuda:", "-1"):
        with pytest.raises(ConfigError, match=r"^device: "):
            devices(text)
    with pytest.raises(ConfigError, match=rf"^device: '{found}'; torch sees {found} GPUs here"):
        devices(str(found))
