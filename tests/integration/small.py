"""Runs small enough for tests: a few scenes of 64 pixels."""

import hashlib
from dataclasses import replace

import torch

from visiontrain import app
from visiontrain.core.config import from_keys
from visiontrain.core.types import Place
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.evaluate import Evaluation
from visiontrain.engine.run_folder import RunFolder
from visiontrain.prepare import prepare
from visiontrain.recipe import Run

KEYS = {
    "data": {"source": "tiny", "train_images": 12, "val_images": 4, "workers": 0},
    "imgsz": 64,
    "batch": 4,
    "epochs": 2,
    "device": "cpu",
    "log": {"to": [], "plots": False, "every": 3},
}
STEPS = 3  # per epoch


def config(out, **keys):
    return from_keys(Run, {**KEYS, "out": out, **keys})


def prepared(out, **keys):
    """Return a trainer for one process, as the worker builds it."""
    run = prepare(config(out, **keys))
    return run, app.build(run, Place(torch.device("cpu")))


def scores(trainer, values):
    """Let evaluation answer with the next of `values` instead of looking."""
    left = iter(values)
    parts = replace(
        trainer.parts, evaluate=lambda _: Evaluation({"map": next(left)}, torch.empty(0, 7))
    )
    trainer.parts = parts
    return trainer


class Watch:
    """A Progress that keeps what it is told, and calls `act` after every step that is shown."""

    def __init__(self, act=lambda done: None):
        self.act, self.lines, self.rows, self.steps = act, [], [], []

    def start_epoch(self, epoch, epochs, steps):
        self.epoch = epoch

    def step(self, done, terms, numbers):
        self.steps.append((self.epoch, done, terms, numbers))
        self.act(len(self.steps))

    def end_epoch(self, row):
        self.rows.append(row)

    def message(self, text):
        self.lines.append(text)

    def close(self):
        pass


def watched(trainer, act=lambda done: None):
    watch = Watch(act)
    trainer.parts = replace(trainer.parts, progress=watch)
    return watch


def digests(folder):
    """Return the sha256 of both weights files."""
    paths = [folder / "weights" / f"{name}.safetensors" for name in ("best", "last")]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def weights_of(trainer):
    return {name: t.clone() for name, t in trainer.learner.model.state_dict().items()}


def poison(fitter, bad):
    """Give the steps that `bad` holds targets that are not numbers."""
    clean = fitter.parts.steps

    def steps(first, skipped):
        for step in clean(first, skipped):
            if bad(step.step):
                for batch in step.micro_batches:
                    batch.targets[..., 1:5] = float("nan")
            yield step

    fitter.parts = replace(fitter.parts, steps=steps)
    return fitter


def newest(out):
    """Return the newest checkpoint of a run."""
    return CheckpointStore(RunFolder(out).checkpoints, 3).newest().snapshot
