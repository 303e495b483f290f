"""Saving and going on, over modes and numbers of processes, beside training or not."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_strategies import advance, control, gap, learner_of, settings

from visiontrain.core import durable
from visiontrain.core.errors import ConfigError, StorageError
from visiontrain.engine import saving
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.config import SaveConfig
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.saving import Saver
from visiontrain.engine.tensor_file import StoredTensors
from visiontrain.engine.weights import WeightsMeta

META = WeightsMeta("detect", {"kind": "yolo_n"}, ["a"], 64)


def saver_of(learner, out, **config):
    return Saver(learner, RunFolder(Path(out)), META, SaveConfig(**config), {"seed": 0})


def newest(out):
    return CheckpointStore(RunFolder(Path(out)).checkpoints, 3).newest()


# -- one run through all modes --------------------------------------------------------

READERS = StoredTensors.__getitem__, StoredTensors.rows


def watch_reading():
    """Return lists that fill with the names of tensors read whole, and the bytes of rows read."""
    whole, rows = [], []

    def get(self, name):
        whole.append(name)
        return READERS[0](self, name)

    def some(self, name, start, stop):
        value = READERS[1](self, name, start, stop)
        rows.append(value.nbytes)
        return value

    StoredTensors.__getitem__, StoredTensors.rows = get, some
    return whole, rows


def go_on(out, kind, sharded, count):
    """Go on for a step in a mode; return what was read whole, and the shares read and written."""
    learner = learner_of(settings(kind, "fp64", seed=count))
    saver = saver_of(learner, out, sharded=sharded)
    whole, rows = watch_reading()
    found = saver.newest()
    if found is not None:
        saver.restore(found)
        learner.step, learner.samples = (found.snapshot.progress[k] for k in ("step", "samples"))
    StoredTensors.__getitem__, StoredTensors.rows = READERS
    advance(learner, 1)
    saver.checkpoint({"step": learner.step, "samples": learner.samples})
    saver.settle()
    state = learner.tensors()
    size = sum(t.nbytes for named in state.values() for t in named.values())
    pieces = [p for named in state.values() for p in learner.strategy.shard(named).values()]
    return whole, sum(rows) / size, sum(piece.rows.nbytes for piece in pieces) / size


def test_shards_are_read_in_any_mode_by_any_number_of_processes(ranks, tmp_path):
    """fsdp on two, one device, pipeline, fsdp on three, whose cuts are uneven, ddp."""
    chain = [("fsdp", 2), ("single", 1), ("pipeline", 2), ("fsdp", 3), ("ddp", 2)]
    for count, (kind, world) in enumerate(chain):
        sharded = kind == "fsdp"
        args = str(tmp_path), kind, sharded, count
        got = [go_on(*args)] if kind == "single" else ranks(world).run(go_on, *args)
        path = newest(tmp_path).path
        assert len(list(path.glob("shard-*"))) == (world if sharded else 0)
        for whole, read, written in got if sharded else ():
            assert not any(name.endswith((".weight", ".bias", ".exp_avg")) for name in whole)
            assert read < 1.1 / world
            assert written < 1.1 / world  # so nobody had the whole in memory
    want = control(len(chain))
    tensors = newest(tmp_path).snapshot.tensors
    assert gap(want, {part: dict(tensors[part]) for part in want}) < 1e-9


# -- what goes wrong ------------------------------------------------------------------


def save_badly(out, kind, background, who):
    """Save while the disk of one process is full, then again; return what was heard when."""
    learner = learner_of(settings(kind))
    config = {"sharded": kind == "fsdp", "background": background}
    saver = saver_of(learner, out, **config)
    saver.checkpoint({"step": 0})
    saver.settle()
    sync = durable.os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    heard = []
    learner.step += 1
    try:
        if learner.strategy.place.rank == who:
            durable.os.fsync = full
        for act in (lambda: saver.checkpoint({"step": 1}), saver.settle):
            try:
                act()
                heard.append(None)
            except StorageError as error:
                heard.append(str(error).split(" (")[0].rpartition(": ")[2])
    finally:
        saver.close()
        durable.os.fsync = sync
    return heard


@pytest.mark.parametrize(("kind", "who"), [("ddp", 0), ("fsdp", 0), ("fsdp", 1)])
@pytest.mark.parametrize("background", [True, False])
def test_every_process_hears_of_a_full_disk(ranks, tmp_path, kind, who, background):
    said = "no space left on the disk"
    want = [None, said] if background else [said, None]
    assert ranks(2).run(save_badly, str(tmp_path), kind, background, who) == [want] * 2
    assert newest(tmp_path).snapshot.step == 0
    assert not list(RunFolder(tmp_path).checkpoints.glob(".part-*"))


def save_apart(out):
    """Save in shards where the second process sees another folder."""
    saving.SEEN_S = 0.0
    learner = learner_of(settings("fsdp"))
    saver = saver_of(learner, f"{out}/{learner.strategy.place.rank}", sharded=True)
    try:
        saver.checkpoint({})
    except ConfigError as error:
        return str(error)
    return None


def test_a_folder_that_is_not_shared_is_refused(ranks, tmp_path):
    for line in ranks(2).run(save_apart, str(tmp_path)):
        assert line.startswith("save.sharded: true, but not every process sees ")
        assert "\n" not in line


# -- beside training ------------------------------------------------------------------


def test_a_save_is_of_its_moment_and_the_next_waits_for_it(tmp_path, monkeypatch):
    learner = learner_of(settings("single"))
    saver = saver_of(learner, tmp_path)
    gate, save = threading.Event(), saver.store.save
    monkeypatch.setattr(saver.store, "save", lambda snapshot: (gate.wait(10), save(snapshot)))
    progress, want = {"step": 0, "skipped": [1]}, learner.collect()
    saver.checkpoint(progress)
    progress["skipped"].append(2)
    advance(learner, 1)
    assert newest(tmp_path) is None
    threading.Timer(0.2, gate.set).start()
    saver.checkpoint({"step": 1})
    first = CheckpointStore(RunFolder(tmp_path).checkpoints, 3).newest()
    assert first is not None  # the first is there before the second begins
    saver.settle()
    found = CheckpointStore(RunFolder(tmp_path).checkpoints, 3)
    assert found.newest().snapshot.step == 1
    old = saving.read(found.folder / "step-000000")
    assert old.progress == {"step": 0, "skipped": [1]}
    assert gap(want, {part: dict(old.tensors[part]) for part in want}) == 0


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_checkpoint import snapshot
from visiontrain.core import durable
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.writer import Writer

sync = os.fsync
for call in range(1, 13):
    store = CheckpointStore(Path(sys.argv[1]) / str(call), 3)
    store.save(snapshot(1))
    child = os.fork()
    if not child:
        calls = []
        def dying(handle):
            calls.append(handle)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)
        durable.os.fsync = dying
        writer = Writer(background=True)
        writer.start("checkpoint", lambda: store.save(snapshot(2)))
        writer.wait("checkpoint")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(call, os.WIFSIGNALED(status), store.newest().snapshot.step, flush=True)
"""


def test_killed_between_any_two_files_the_older_one_is_good(tmp_path):
    """Between files, before the folder has its name, before `last` points at it."""
    path = [str(Path(__file__).parents[1] / "unit"), *sys.path]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), *path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines()]
    assert [row[1] for row in rows] == ["True"] * 11 + ["False"]
    # Six files, the manifest and the folder: then it has its name, and the rest is tidying.
    assert [row[2] for row in rows] == ["1"] * 8 + ["2"] * 4
