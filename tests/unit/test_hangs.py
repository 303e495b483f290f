"""Which rank is named when some wait, and how a process that hangs tells where it is."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from visiontrain.core.errors import StorageError
from visiontrain.strategies import stacks
from visiontrain.strategies.heartbeat import UNSEEN, Note, is_lost, judge
from visiontrain.strategies.stacks import ProcessHandle

HERE = ProcessHandle("", 0, 0, "", 0)
COLLECTIVE = ["  in train", '  File "lib/torch/distributed/distributed_c10d.py", line 9 in barrier']
BACKWARD = ["  in train", '  File "lib/torch/autograd/graph.py", line 9 in _engine_run_backward']
LOADER = [COLLECTIVE[1], "  in train", "  in next", "  in wait"]


def notes(*given):
    return {rank: Note(*values, HERE) for rank, values in enumerate(given)}


def test_a_rank_that_is_silent_is_named_before_one_that_is_elsewhere():
    first = notes((9, "waits", []), (9, "runs", COLLECTIVE), (9, "runs", LOADER))
    later = notes((9, "waits", []), (9, "runs", COLLECTIVE), (11, "runs", LOADER))
    found = judge(first, later, me=0)
    assert (found.ranks, found.silent) == ([1], True)


def test_a_rank_that_lives_is_named_where_it_does_not_wait():
    first = notes((9, "waits", []), (8, "runs", BACKWARD), (8, "runs", LOADER), (9, "waits", []))
    later = notes((9, "waits", []), (10, "runs", BACKWARD), (10, "runs", LOADER), (9, "waits", []))
    found = judge(first, later, me=0)
    assert (found.ranks, found.silent) == ([2], False)
    assert not judge({0: first[0], 1: first[1]}, {0: later[0], 1: later[1]}, me=0).ranks


def test_a_rank_that_never_showed_anything_is_silent():
    first = {0: Note(1, "waits", [], HERE), 1: UNSEEN}
    assert judge(first, first, me=0).ranks == [1]


def test_the_last_place_of_ours_is_shown_before_a_librarys():
    ours = [f'  File "{Path(stacks.__file__)}", line {line} in save' for line in (1, 2)]
    theirs = [f'  File "lib/numpy.py", line {line} in load' for line in range(9)]
    assert stacks.innermost([*ours, *theirs], 3) == [ours[1], *theirs[-3:]]
    assert stacks.innermost([*theirs, *ours], 3) == [theirs[-1], *ours]
    assert stacks.innermost(theirs, 3) == theirs[-3:]


def test_only_errors_of_the_group_ask_for_a_culprit():
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer"))
    assert not is_lost(RuntimeError("CUDA out of memory"))
    assert not is_lost(KeyError("x"))
    assert not is_lost(StorageError("/data/gloo/run: cannot be written"))


PROCESS = """
import ctypes, json, os, signal, sys
from dataclasses import asdict
from visiontrain.strategies.stacks import StackWriter
def hold():
    ctypes.PyDLL(None).sleep(60)  # keeps the interpreter's lock
def stop():
    os.kill(os.getpid(), signal.SIGSTOP)
writer = StackWriter()
writer.open()
print(json.dumps(asdict(writer.process)), flush=True)
{"hold": hold, "stop": stop}[sys.argv[1]]()
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", ["hold", "stop"])
def test_a_process_that_runs_no_python_tells_where_it_is_and_ends(tmp_path, how):
    (tmp_path / "script.py").write_text(PROCESS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), how],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        stdout=subprocess.PIPE,
    )
    handle = ProcessHandle(**json.loads(process.stdout.readline()))
    process.stdout.close()
    while state_of(process) != ("T" if how == "stop" else "S"):
        time.sleep(0.01)
    assert replace(handle, token="another's").stack(9) == ()
    *_, caller, innermost = handle.stack(9)
    assert innermost.endswith(f" in {how}")
    assert caller.endswith(" in <module>")
    handle.kill()
    assert process.wait(10) < 0
    assert handle.is_gone()
    assert handle.stack(9) == ()
    assert not replace(handle, machine="another").is_gone()


def state_of(process):
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
