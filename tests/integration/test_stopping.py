"""What is saved when a run stops at a bad moment, and what going on otherwise makes of it."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from small import config, digests, newest, poison, prepared, watched

from visiontrain import app, commands
from visiontrain.core.errors import ConfigError, StorageError
from visiontrain.core.types import Place
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.run_folder import RunFolder
from visiontrain.tasks.detect import DetectTask


def stop_after(fitter, step):
    return watched(fitter, lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == step else 0)


def test_a_stop_right_after_a_bad_step_saves(tmp_path):
    _, fitter = prepared(tmp_path, **{"log.every": 1})
    watch = stop_after(poison(fitter, lambda step: step == 1), 2)
    assert fitter.fit().exit_code == 75
    again = f"visiontrain train out={tmp_path} resume=true"
    assert watch.lines[-1] == f"saved at step 2; go on with: {again}"
    saved = newest(tmp_path)
    assert saved.step == 2
    live = fitter.learner.model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.tensors["model"].items())


def stop_in_decode(monkeypatch, call):
    """Let SIGTERM come while a batch of an evaluation is decoded."""
    calls, decode = [], DetectTask.decode

    def decoding(self, outputs, batch):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, outputs, batch)

    monkeypatch.setattr(DetectTask, "decode", decoding)
    return calls


# Of 4 images in batches of 2: two calls per evaluation, of which there are three.
@pytest.mark.parametrize(("call", "epochs"), [(1, 0), (3, 1), (5, 2)])
def test_a_stop_during_an_evaluation_saves_and_scores_again(
    tmp_path, monkeypatch, capsys, call, epochs
):
    keys = {"batch": 2, "data.train_images": 4, "log.to": ["console"]}
    prepared(tmp_path / "whole", **keys)[1].fit()
    with monkeypatch.context() as patch:
        calls = stop_in_decode(patch, call)
        capsys.readouterr()
        assert prepared(tmp_path / "cut", **keys)[1].fit().exit_code == 75
        assert len(calls) == call  # at once
    said = "trained and saved, not scored; its results" if epochs == 2 else "saved at step "
    assert said in capsys.readouterr().out
    assert newest(tmp_path / "cut").progress["epochs"] == epochs
    assert prepared(tmp_path / "cut", resume=True, **keys)[1].fit().exit_code == 0
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    rows = [
        RunFolder(tmp_path / name).results.read_text().splitlines() for name in ("cut", "whole")
    ]
    assert len(rows[0]) == len(rows[1]) == 3


def stop_one(out, kind):
    """Be one rank of a run; only the last one gets a signal, after the first step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = (0, 1) if kind == "pipeline" else (rank, world)
    keys = {"log.every": 1, "model.norm": "group", "save.sharded": kind == "fsdp"}
    run = config(out, strategy=kind, **keys)
    trainer = app.build(run, Place(torch.device("cpu"), rank, world, shard, is_main=rank == 0))
    fitted = train_step_watched(trainer, rank == world - 1)
    return fitted.exit_code, trainer.learner.step


def train_step_watched(trainer, signalled):
    steps = trainer.parts.steps

    def watched_steps(first, skipped):
        for step in steps(first, skipped):
            yield step
            if signalled and trainer.learner.step == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

    trainer.parts = replace(trainer.parts, steps=watched_steps)
    return trainer.fit()


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "pipeline"])
def test_a_signal_to_one_rank_stops_and_saves_all(ranks, tmp_path, kind):
    assert ranks(2).run(stop_one, tmp_path, kind) == [(75, 1)] * 2
    assert newest(tmp_path).step == 1  # the second is not begun


def run_full(out):
    """Be one rank of a run whose first rank finds the disk full when it saves an epoch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    run = config(out, strategy="ddp")
    trainer = app.build(run, Place(torch.device("cpu"), rank, world, (rank, world), rank == 0))
    save = CheckpointStore.save

    def full(self, snapshot):
        if snapshot.step:
            raise StorageError("checkpoints: no space; make room")
        return save(self, snapshot)

    CheckpointStore.save = full
    try:
        trainer.fit()
    except StorageError as error:
        return str(error)
    finally:
        CheckpointStore.save = save
    return None


def test_every_rank_learns_that_the_disk_is_full(ranks, tmp_path):
    assert ranks(2).run(run_full, tmp_path) == ["checkpoints: no space; make room"] * 2


def test_a_folder_takes_one_run_at_a_time(tmp_path):
    hold = f"""
from pathlib import Path
from visiontrain.engine.run_folder import RunFolder
with RunFolder(Path({str(tmp_path)!r})).held():
    print("held", flush=True)
    input()
"""
    path = os.pathsep.join(p for p in sys.path if p)
    other = subprocess.Popen(
        [sys.executable, "-c", hold],
        env=os.environ | {"PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=r"is in use by another run"):
        commands.train(config(tmp_path, resume=True))
    other.communicate("\n")
    assert commands.train(config(tmp_path, resume=True, epochs=1))[1] == 0


@pytest.mark.parametrize(("before", "after"), [("fp16", "fp32"), ("fp32", "fp16")])
def test_another_precision_on_resume_starts_with_its_own_loss_scale(tmp_path, before, after):
    keys = {"log.every": 1, "epochs": 1}
    _, fitter = prepared(tmp_path, precision=before, **keys)
    stop_after(fitter, 2)
    fitter.fit()
    assert ("loss_scale" in newest(tmp_path).tensors["strategy"]) == (before == "fp16")
    _, fitter = prepared(tmp_path, precision=after, resume=True, **keys)
    assert fitter.fit().exit_code == 0
    want = 128.0 if after == "fp16" else 1.0
    assert fitter.strategy.precision.scale == want
