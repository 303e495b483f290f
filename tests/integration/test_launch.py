"""Starting processes: from any script, with exit codes, errors and signals brought back."""

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
from visiontrain.strategies.launch import devices, run

# A user's script: no main guard, and it would run away if a process imported it again.
SCRIPT = """
import entries
from visiontrain.strategies.config import DDP
from visiontrain.strategies.launch import run
code = run(DDP(processes=2, threads=1), "cpu", entries.{entry}, "{text}")
print("code", code, flush=True)
"""
TWO = DDP(processes=2, threads=1)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script which calls `run` with an entry."""
    started = []

    def popen(entry, text="0", **env):
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


def test_a_script_without_a_main_guard_gets_the_exit_code(start):
    out, error = start("agree", "75").communicate()
    assert (out, error) == ("code 75\n", "")


def test_a_bug_on_a_rank_is_named_with_its_traceback():
    with pytest.raises(RankError) as caught:
        run(TWO, "cpu", entries.crash, "bug")
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("rank 1 of 2: KeyError: ")
    assert "in crash" in "\n".join(rest)
    assert rest[-1].startswith("KeyError")


def test_an_error_for_the_user_arrives_as_it_was():
    with pytest.raises(DataError, match=r"^data: empty; give some$"):
        run(TWO, "cpu", entries.crash, "user")


def test_a_killed_rank_is_named():
    with pytest.raises(RankError, match=r"^rank 1 of 2: ended by SIGKILL"):
        run(TWO, "cpu", entries.crash, "kill")


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGINT", 130)])
def test_signals_reach_all_processes_which_save(start, name, code):
    process = start("wait")
    ready(process)
    process.send_signal(getattr(signal, name))
    assert process.communicate() == (f"code {code}\n", "")


def test_a_signal_before_there_is_anything_to_save(start):
    process = start("wait")
    time.sleep(0.5)  # while torch is imported, here or in the workers
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate()
    assert out.endswith("code 143\n") or process.returncode == -signal.SIGTERM


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


def test_one_device_under_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^strategy: single under torchrun; "):
        run(Single(), "cpu", entries.agree, "0")


def test_devices():
    found = torch.cuda.device_count()
    assert devices("cpu") == [torch.device("cpu")]
    assert len(devices("auto")) == max(1, found)
    for text in ("gpu", "0,x", "", "cuda:", "-1"):
        with pytest.raises(ConfigError, match=r"^device: "):
            devices(text)
    with pytest.raises(ConfigError, match=rf"^device: '{found}'; torch sees {found} GPUs here"):
        devices(str(found))
