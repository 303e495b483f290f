"""Runs of several processes of which some die, hang, or are asked to stop."""

import csv
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from small import KEYS, STEPS, config, prepared, watched

from visiontrain import app
from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Place
from visiontrain.engine.checkpoint import CheckpointStore, read
from visiontrain.engine.run_folder import RunFolder
from visiontrain.prepare import prepare, restarted, write_config
from visiontrain.recipe import Run
from visiontrain.strategies import comm
from visiontrain.strategies.config import DDP
from visiontrain.strategies.devices import settle
from visiontrain.strategies.stacks import PACKAGE

TIMES = {"seconds", "images_per_s", "data_wait"}
EPOCHS, TIMEOUT_S = 5, 20
LONG = {"epochs": EPOCHS, "save.every_steps": 1, "save.keep": 9, "strategy": "ddp"}
WORDS = [
    *(f"data.{key}={value}" for key, value in KEYS["data"].items()),
    *("imgsz=64", "batch=4", "device=cpu", "log.plots=false", "log.every=3"),
    *(f"{key}={value}" for key, value in LONG.items()),
]


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a Python module in `tmp_path`, with its errors in a file."""
    started = []

    def popen(*words, **env):
        path = os.pathsep.join(p for p in sys.path if p)
        with (tmp_path / "errors").open("a") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                env=os.environ | {"PYTHONPATH": path, "TMPDIR": str(tmp_path)} | env,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        started.append(process)
        return process

    yield popen
    for process in started:
        left = children(process) if process.poll() is None else []  # torchrun's outlive it
        process.kill()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def children(process):
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.is_file() else []


def wait_until(process, true):
    end = time.monotonic() + 120
    while not (found := true()):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def steps(out):
    """Return the newest checkpoint's step, -1 where there is none."""
    names = [path.name for path in RunFolder(out).checkpoints.glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=-1)


def rows(out):
    with RunFolder(out).results.open() as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]


def restarts(folder):
    return (folder / "errors").read_text().count("restart ")


def be_rank(out, resume):
    """Be one rank of a run in this session's processes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    run = None
    if rank == 0:
        run = prepare(config(out, **LONG, resume=resume))
    dist.barrier()
    run = run or prepare(config(out, **LONG, resume=True))
    place = Place(torch.device("cpu"), rank, world, (rank, world), is_main=rank == 0)
    return app.build(run, place).fit().exit_code


@pytest.mark.timeout(600)  # it starts eight processes, and waits for a timeout
def test_what_befalls_ranks_costs_steps_and_changes_nothing(start, ranks, tmp_path):
    """A rank is killed, then one is stopped, then one is asked to stop and the run goes on."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert ranks(2).run(be_rank, whole, False) == [0, 0]
    process = start(
        *("visiontrain", "train", *WORDS, "strategy.processes=2", "strategy.threads=1"),
        *(f"strategy.timeout_s={TIMEOUT_S}", f"out={out}"),
    )

    def pid(rank):
        wait_until(process, lambda: list(tmp_path.glob(f"visiontrain-*/pid-{rank}")))
        return int(next(tmp_path.glob(f"visiontrain-*/pid-{rank}")).read_text())

    wait_until(process, lambda: steps(out) >= 2)
    os.kill(pid(1), signal.SIGKILL)
    wait_until(process, lambda: restarts(tmp_path) == 1)
    seen = steps(out)
    wait_until(process, lambda: steps(out) >= seen + 2)
    os.kill(pid(0), signal.SIGSTOP)
    stopped = time.monotonic()
    wait_until(process, lambda: restarts(tmp_path) == 2)
    assert time.monotonic() - stopped < TIMEOUT_S + 20  # this machine may be busy
    seen = steps(out)
    wait_until(process, lambda: steps(out) >= seen + 2)
    os.kill(pid(1), signal.SIGTERM)
    seen = steps(out)
    assert process.wait() == 75
    assert steps(out) <= seen + 2  # one that was being saved, one until all agree
    errors = (tmp_path / "errors").read_text()
    first, second, *stack = errors.splitlines()
    assert first == "restart 1 of 3, as rank 1 of 2: ended by SIGKILL; was memory short?"
    assert re.fullmatch(
        "restart 2 of 3, as rank 0 of 2: no sign of life( while the others waited 14 s)?; "
        "it was last in",
        second,
    )
    assert all(re.match(r'  File ".*", line \d+ in ', line) for line in stack)
    assert any(PACKAGE in line for line in stack)

    assert ranks(2).run(be_rank, out, True) == [0, 0]
    assert [row["epoch"] for row in rows(out)] == [str(e + 1) for e in range(EPOCHS)]
    assert rows(out) == rows(whole)
    scores = [json.loads(RunFolder(path).metrics.read_text())["map"] for path in (out, whole)]
    assert scores[0] == scores[1]
    for path in RunFolder(out).checkpoints.glob("step-*"):
        read(path)  # every byte is as it was written
    ends = [CheckpointStore(RunFolder(path).checkpoints, 9).newest() for path in (out, whole)]
    for part, tensors in ends[0].snapshot.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, ends[1].snapshot.tensors[part][name]), name


def some_steps(out, kind, stop, last):
    """Be the only or one of several ranks, until `stop` steps are done; return what was read."""
    world = 1 if kind == "single" else dist.get_world_size()
    rank = 0 if world == 1 else dist.get_rank()
    trainer = app.build(
        config(out, strategy=kind),
        Place(torch.device("cpu"), rank, world, (rank, world), rank == 0),
    )
    steps, seen = trainer.parts.steps, []

    def recorded(first, skipped):
        for step in steps(first, skipped):
            if step.step < stop:
                seen.extend(images_of(step))
            elif rank == world - 1:  # it is read, and not begun
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    trainer.parts = replace(trainer.parts, steps=recorded)
    return trainer.fit().exit_code, seen


def images_of(step):
    """List (step, id, pixels) of what a rank reads in a step."""
    return [
        (step.step, int(index), hashlib.sha256(image.numpy().tobytes()).hexdigest())
        for batch in step.micro_batches
        for index, image, valid in zip(batch.ids, batch.images, batch.valid, strict=True)
        if valid
    ]


def test_another_number_of_processes_goes_on_with_the_same_images(ranks, tmp_path):
    """Two processes save, one goes on, then three."""
    last = KEYS["epochs"] * STEPS
    done = ranks(2).run(some_steps, tmp_path, "ddp", 2, last)
    done.append(some_steps(tmp_path, "single", 4, last))
    done += ranks(3).run(some_steps, tmp_path, "ddp", last, last)
    assert [code for code, _ in done] == [75, 75, 75, 0, 0, 0]
    steps = app.build(config(tmp_path), Place(torch.device("cpu"))).parts.steps(0, frozenset())
    whole = [image for step in steps for image in images_of(step)]
    assert sorted(image for _, seen in done for image in seen) == sorted(whole)
    assert len(whole) == last * KEYS["batch"]


def test_a_restart_by_torchrun_goes_on_in_the_same_folder(start, tmp_path):
    process = start(
        *("torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"),
        *("-m", "visiontrain", "train", *WORDS, "augment=none"),
    )
    out = tmp_path / "runs" / "detect" / "train"
    wait_until(process, lambda: steps(out) >= 2)
    (child,) = children(process)
    os.kill(child, signal.SIGKILL)
    printed, _ = process.communicate()
    assert process.returncode == 0, (tmp_path / "errors").read_text()
    assert re.search(r"going on, from runs/detect/train/checkpoints/step-\d+", printed)
    assert [path.name for path in out.parent.iterdir()] == ["train"]
    assert [row["epoch"] for row in rows(out)] == [str(e + 1) for e in range(EPOCHS)]


def torchrun_starts(world, monkeypatch):
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    for name, value in (told | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, str(value))


def test_torchrun_restarts_by_its_own_count(monkeypatch):
    torchrun_starts(2, monkeypatch)
    with pytest.raises(ConfigError, match=r"^strategy.max_restarts: 5; torchrun would have to "):
        settle(DDP(max_restarts=5), "cpu")


def test_a_run_goes_on_with_as_many_processes_as_torchrun_starts_again(tmp_path, monkeypatch):
    torchrun_starts(2, monkeypatch)
    before = prepare(config(tmp_path, strategy="ddp", batch=3))
    torchrun_starts(3, monkeypatch)
    run = restarted(before.model_dump_json(), "train")
    assert run.strategy.processes == 3
    assert run.model_copy(update={"strategy": before.strategy}) == before
    assert "processes: 3" in RunFolder(tmp_path).config.read_text()
    RunFolder(tmp_path).discard_unused()
    assert (
        restarted(before.model_dump_json(), "train") is None
    )  # a mistake of the user's left nothing


# One process alone waits; two fail the first time.
MEMBERS = """
import os, secrets, sys, time
from pathlib import Path
from visiontrain.strategies import member
text = member.once("name", lambda before: before or secrets.token_hex(4))
world = os.environ["WORLD_SIZE"]
print(world, text, flush=True)
while world == "1":
    time.sleep(1)
mark = Path("failed-" + os.environ["RANK"])
again = mark.exists()
mark.touch()
sys.exit(not again)
"""


def test_what_rank_0_chose_outlives_a_change_of_members_and_a_restart(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "members.py").write_text(MEMBERS)
    words = [
        *("torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"),
        *("--rdzv-conf=last_call_timeout=1", str(tmp_path / "members.py")),
    ]
    # As torch shares its store (by default), no node can join: torch 2.14 loses where that is.
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    first = start(*words, **own)
    alone = first.stdout.readline()
    second = start(*words, **own)
    printed = alone + first.communicate()[0] + second.communicate()[0]
    assert [first.returncode, second.returncode] == [0, 0], (tmp_path / "errors").read_text()
    worlds, texts = zip(*(line.split() for line in printed.splitlines()), strict=True)
    assert "1" in worlds
    assert worlds.count("2") >= 4  # of both attempts
    assert len(set(texts)) == 1


STOPPED = """
import os, signal
import entries
from visiontrain.strategies import member
from visiontrain.strategies import comm
from visiontrain.strategies.config import DDP
member.join(DDP(timeout_s=5), "cpu", entries.stop_rank_0, "", {})
"""


def test_without_a_launcher_the_rank_that_holds_the_store_is_named(start, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    (tmp_path / "stopped.py").write_text(STOPPED)
    stopped, other = (start("stopped", **env, RANK=rank) for rank in "01")
    assert other.wait() == 1
    assert stopped.wait() < 0  # nobody else would end it
    errors = (tmp_path / "errors").read_text()
    assert "RankError: rank 0 of 2: no sign of life while the others waited 3.5 s; it" in errors
    assert "in stop_rank_0" in errors.split("RankError")[1]


def test_stages_are_chosen_anew_for_another_number_of_processes(tmp_path):
    strategy = {"kind": "pipeline", "processes": 3, "stages": ["stage4", "up4"]}
    keys = {"data": {"source": "tiny"}, "imgsz": 64, "batch": 8, "out": str(tmp_path)}
    run = build(Run, keys | {"strategy": strategy})
    write_config(run)
    again = restarted(
        run.model_dump_json(), "train"
    )  # on two, the default where no launcher says more
    assert again.strategy.processes == 2
    assert len(again.strategy.stages) == 1


def be_stage(out):
    """Be one of three processes that go on with a pipeline's run."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mode = {"kind": "pipeline", "processes": world}
    # Where to cut a model is measured: the main process settles the run for all.
    keys = LONG | {"strategy": mode, "resume": True}
    text = prepare(config(out, **keys)).model_dump_json() if rank == 0 else None
    run = Run.model_validate_json(comm.broadcast_json(text))
    place = Place(torch.device("cpu"), rank, world, (0, 1), is_main=rank == 0)
    return app.build(run, place).fit().exit_code


def test_a_killed_stage_is_named_and_its_run_goes_on_with_fewer_and_with_more(
    start, ranks, tmp_path
):
    """A pipeline of two loses one, is stopped, goes on alone, is stopped, ends as one of three."""
    out = tmp_path / "run"
    words = [word for word in WORDS if not word.startswith("strategy")]
    words += ["strategy=pipeline", "strategy.processes=2", "strategy.stages=[up4]"]
    process = start("visiontrain", "train", *words, f"out={out}", OMP_NUM_THREADS="1")
    wait_until(process, lambda: steps(out) >= 2)
    os.kill(int(next(tmp_path.glob("visiontrain-*/pid-1")).read_text()), signal.SIGKILL)
    wait_until(process, lambda: restarts(tmp_path) == 1)
    errors = (tmp_path / "errors").read_text()
    want = "restart 1 of 3, as rank 1 of 2, stage 1 from up4: ended by SIGKILL; was memory short?"
    assert errors.splitlines() == [want]
    seen = steps(out)
    wait_until(process, lambda: steps(out) >= seen + 2)
    process.terminate()
    assert process.wait() == 75
    first = steps(out)

    _, alone = prepared(out, **LONG | {"strategy": "single", "log.every": 1}, resume=True)
    watched(alone, lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == 2 else None)
    assert alone.fit().exit_code == 75
    assert steps(out) == first + 2
    assert ranks(3).run(be_stage, out) == [0] * 3
    assert steps(out) == EPOCHS * STEPS
    assert [row["epoch"] for row in rows(out)] == [str(e + 1) for e in range(EPOCHS)]
