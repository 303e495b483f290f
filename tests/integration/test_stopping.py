"""What is saved when a run stops at a bad moment, and what going on otherwise makes of it."""

import os
import signal

import pytest
import torch
from small import prepared, watched
from test_train import poison

from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.run_folder import RunFolder


def stop_after(fitter, step):
    return watched(fitter, lambda done: os.kill(os.getpid(), signal.SIGTERM) if done == step else 0)


def newest(out):
    return CheckpointStore(RunFolder(out).checkpoints, 3).newest().snapshot


def test_a_stop_right_after_a_bad_step_saves(tmp_path):
    _, fitter = prepared(tmp_path, **{"log.every": 1})
    watch = stop_after(poison(fitter, lambda step: step == 1), 2)
    assert fitter.fit().exit_code == 75
    assert watch.lines[-1] == "saved at step 2; resume=true goes on"
    saved = newest(tmp_path)
    assert saved.step == 2
    live = fitter.learner.model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.tensors["model"].items())


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
