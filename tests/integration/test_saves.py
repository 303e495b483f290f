"""When a run saves, what a save that fails means, and what ends in the midst of an epoch."""

import csv
import signal
from dataclasses import replace

import pytest
import torch
from small import STEPS, config, newest, prepared, scores, watched

from visiontrain import app
from visiontrain.core.errors import Stopped, StorageError
from visiontrain.core.types import Place
from visiontrain.engine import saving
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.run_folder import RunFolder
from visiontrain.prepare import prepare


def again(out, **keys):
    """Return a trainer that goes on with a run."""
    return app.build(prepare(config(out, resume=True, **keys)), Place(torch.device("cpu")))


def rows(out):
    with RunFolder(out).results.open(newline="") as file:
        return list(csv.DictReader(file))


def test_steps_between_saves_count_at_the_end_of_an_epoch_too(tmp_path):
    keys = {"save.every_epochs": 99, "save.every_steps": STEPS, "save.keep": 9}
    _, fitter = prepared(tmp_path, epochs=3, **keys)
    scores(fitter, [0.1] * 9).fit()
    saved = sorted(path.name for path in RunFolder(tmp_path).checkpoints.glob("step-*"))
    assert saved == [f"step-{step:06d}" for step in range(0, 3 * STEPS + 1, STEPS)]


def test_a_part_of_an_epoch_is_scored_even_if_a_signal_comes_first(tmp_path):
    _, fitter = prepared(tmp_path, epochs=9, time=1e-9)

    def stopped(asked):
        fitter.signals.received = signal.SIGTERM
        raise Stopped

    fitter.parts = replace(fitter.parts, evaluate=stopped)
    assert fitter.fit().exit_code == 75
    assert not RunFolder(tmp_path).results.exists()
    later = scores(again(tmp_path), [0.5] * 2)
    assert later.fit().exit_code == 0
    assert [(row["epoch"], row["step"], row["val/map"]) for row in rows(tmp_path)] == [
        ("1", "1", "0.5")
    ]


def test_an_epoch_that_time_cut_has_one_row_with_all_its_steps(tmp_path):
    for name, first in (("whole", {}), ("cut", {"time": 1e-9})):
        _, fitter = prepared(tmp_path / name, **first)
        scores(fitter, [0.5] * 9).fit()
    assert [row["step"] for row in rows(tmp_path / "cut")] == ["1"]
    scores(again(tmp_path / "cut", time=1.0), [0.5] * 9).fit()
    columns = ["epoch", "step", "samples"]
    for cut, whole in zip(*(rows(tmp_path / name) for name in ("cut", "whole")), strict=True):
        columns += [key for key in whole if key.startswith("train/")]
        assert [cut[key] for key in columns] == [whole[key] for key in columns]


def test_patience_is_of_runs_that_score_every_epoch(tmp_path):
    _, fitter = prepared(tmp_path, val=False)
    fitter.journal.stale = 500  # of a session that ended with a worse score
    assert scores(fitter, [0.5] * 2).fit().metrics["steps"] == 2 * STEPS


@pytest.mark.parametrize("background", [True, False])
def test_no_checkpoint_tells_of_weights_that_are_not_there(tmp_path, monkeypatch, background):
    _, fitter = prepared(tmp_path, epochs=3, **{"save.background": background})
    write = saving.save_weights

    def fails_once(path, meta, tensors):
        if meta.epoch == 2:
            raise StorageError("weights: an error of the disk")
        write(path, meta, tensors)

    monkeypatch.setattr(saving, "save_weights", fails_once)
    with pytest.raises(StorageError, match="an error of the disk"):
        scores(fitter, [0.1, 0.9, 0.2, 0.2]).fit()
    assert newest(tmp_path).progress["best"] == 0.1
    monkeypatch.undo()
    outcome = scores(again(tmp_path), [0.9, 0.2, 0.2]).fit()
    assert outcome.metrics["best_epoch"] == 2


def test_a_save_that_failed_before_is_no_reason_not_to_save_at_a_signal(tmp_path, monkeypatch):
    _, fitter = prepared(tmp_path, epochs=3, **{"log.every": 1})
    save = CheckpointStore.save

    def fails_once(self, snapshot):
        if snapshot.step == STEPS:
            raise StorageError("checkpoints: no space")
        return save(self, snapshot)

    def signalled(done):
        if done == STEPS + 1:
            fitter.signals.received = signal.SIGTERM

    monkeypatch.setattr(CheckpointStore, "save", fails_once)
    scores(fitter, [0.1] * 9)
    watched(fitter, signalled)
    assert fitter.fit().exit_code == 75
    assert newest(tmp_path).step == STEPS + 1
