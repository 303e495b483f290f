"""Loading: in processes as here, whatever starts them, through signals and broken images."""

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from memory import memory_table

from visiontrain.core.errors import DataError
from visiontrain.core.own import Own
from visiontrain.core.types import Item, Sample
from visiontrain.data.collate import collate
from visiontrain.data.config import AugmentConfig, NoAugment
from visiontrain.data.dataset import EvalSet, TrainSet
from visiontrain.data.loader import (
    Plan,
    eval_batches,
    resolve_workers,
    train_steps,
)

SIDE = 32


def pictures(count=6):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (24, 40, 3), np.uint8) for _ in range(count)]


def train_set(*, epochs=1, augment=None, **choices):
    rows = [np.array([[i % 4, 4, 4, 30, 20]], np.float32) for i in range(6)]
    table = memory_table(pictures(), rows, **choices)
    return TrainSet(table, SIDE, augment or AugmentConfig(), seed=5, epochs=epochs)


def of_main():
    """Return a function as of a script, which a loader that begins anew cannot import."""

    def sevens(sample, random):
        return Sample(np.full((SIDE, SIDE, 3), 7, np.uint8), sample.classes, sample.boxes)

    sevens.__module__, sevens.__qualname__ = "__main__", "sevens"
    return Own("__main__:sevens", sevens)


def contents(steps):
    return [
        (step.step, batch.ids.tolist(), batch.images.numpy().tobytes(), batch.targets.tolist())
        for step in steps
        for batch in step.micro_batches
    ]


def test_the_same_where_processes_start_from_nothing(monkeypatch):
    """macOS spawns, newer Pythons start a fork server: both send the data set by pickle."""
    plan = Plan(batch=2, epochs=1, seed=5, workers=1)
    here = contents(train_steps(train_set(), Plan(batch=2, epochs=1, seed=5), 0))
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        assert contents(train_steps(train_set(), plan, 0)) == here
        assert resolve_workers("auto", 1) == 0  # each would hold all pictures anew
        plain = TrainSet(train_set().table, SIDE, NoAugment(own=of_main()), seed=5, epochs=1)
        step = next(train_steps(plain, plan, 0))
        assert (step.micro_batches[0].images == 7).all()
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_sides_are_drawn_by_step_alone():
    def sides(plan, start=0):
        table = train_set().table
        data = TrainSet(table, 96, AugmentConfig(multi_scale=0.5), seed=5, epochs=8)
        return [
            (step.step, batch.images.shape[-1])
            for step in train_steps(data, plan, start)
            for batch in step.micro_batches
        ]

    whole = sides(Plan(batch=2, epochs=8, seed=5))
    assert {side for _, side in whole} == {64, 96, 128}  # multiples of 32 from 48 to 144
    assert sides(Plan(batch=2, epochs=8, seed=5), start=7) == whole[7:]
    other = sides(Plan(batch=2, epochs=8, seed=5, accumulate=2, shard=(1, 2), workers=1))
    assert dict(other) == dict(whole)


def test_a_used_data_set_survives_pickling_unchanged():
    data = train_set()
    before = data[0, 3]
    copy = pickle.loads(pickle.dumps(data))
    assert np.array_equal(copy[0, 3].image, before.image)
    assert np.array_equal(copy[0, 3].targets, before.targets)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells who sent a signal")
def test_a_signal_to_every_process_leaves_the_loaders_at_work(number):
    """A scheduler signals them all; the training process still has a step to finish."""
    others = multiprocessing.active_children()  # another test's, about to end
    plan = Plan(batch=1, epochs=8, seed=5, workers=2)
    steps = train_steps(train_set(epochs=8), plan, 0)
    first = [next(steps) for _ in range(4)]  # both have started
    loaders = [p for p in multiprocessing.active_children() if p not in others]
    assert len(loaders) == 2
    # By another process, as a scheduler is.
    subprocess.run(["kill", f"-{int(number)}", *(str(p.pid) for p in loaders)], check=True)
    rest = contents([*first, *steps])
    whole = train_steps(train_set(epochs=8), Plan(batch=1, epochs=8, seed=5), 0)
    assert rest == contents(whole)


def test_the_training_process_itself_ends_a_loader_at_once():
    """As Python does at exit: a loader that stayed would keep the program from ending."""
    others = multiprocessing.active_children()
    steps = train_steps(train_set(epochs=50), Plan(batch=1, epochs=50, seed=5, workers=2), 0)
    next(steps), next(steps)
    loaders = [p for p in multiprocessing.active_children() if p not in others]
    for loader in loaders:
        loader.terminate()
    for loader in loaders:
        loader.join(20)
    assert [loader.exitcode for loader in loaders] == [0, 0]
    steps.close()


def test_a_run_that_stops_early_leaves_no_loader_behind():
    others = multiprocessing.active_children()
    steps = train_steps(train_set(epochs=50), Plan(batch=1, epochs=50, seed=5, workers=2), 0)
    next(steps)
    loaders = [p for p in multiprocessing.active_children() if p not in others]
    assert loaders
    del steps
    for loader in loaders:  # told to end; one that is still starting takes a while
        loader.join(60)
        assert loader.exitcode is not None


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_is_one_line(workers, caplog):
    data = train_set(broken=range(6))
    with pytest.raises(DataError) as error:
        next(train_steps(data, Plan(2, 1, 0, workers=workers), 0))
    assert str(error.value).startswith("data: no image can be read; of the last: ")


def test_broken_images_are_named_once_and_replaced_in_mosaics_too(caplog):
    holes = train_set(broken={1, 2})
    with caplog.at_level(logging.WARNING):
        found = [holes[0, row] for row in range(6) for _ in range(2)]
    assert sorted(caplog.messages) == [f"picture {i}: broken; replace it" for i in (1, 2)]
    assert [sample.id for sample in found[::2]] == [0, 3, 3, 3, 4, 5]
    again = train_set(broken={1, 2})
    for row in reversed(range(6)):  # whatever was read before
        assert np.array_equal(again[0, row].image, found[2 * row].image)


def test_a_broken_image_is_scored_under_its_own_id_as_grey(caplog):
    table = memory_table(pictures(), broken={4})
    (batch,) = eval_batches(EvalSet(table, SIDE), 6, (0, 1), 0)
    assert batch.ids.tolist() == list(range(6))
    assert batch.valid.tolist() == [1.0] * 6
    assert batch.images[4].unique().tolist() == [114]
    assert torch.equal(batch.frame[4], batch.frame[3])


def test_collate_pads_targets_and_puts_channels_first():
    random = np.random.default_rng(1)
    samples = [
        Item(
            random.integers(0, 256, (8, 8, 3), np.uint8),
            random.random((count, 6)).astype(np.float32),
            np.arange(5, dtype=np.float32) + count,
            7 + count,
        )
        for count in (2, 0, 3)
    ]
    batch = collate(samples, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)  # no copy on the way
    assert batch.targets.shape == (3, 3, 6)
    for k, sample in enumerate(samples):
        assert np.array_equal(batch.images[k].numpy(), sample.image.transpose(2, 0, 1))
        assert np.array_equal(batch.targets[k, : len(sample.targets)], sample.targets)
        assert (batch.targets[k, len(sample.targets) :, 0] == -1).all()
    assert batch.ids.tolist() == [9, 7, 10]
    assert collate(samples[1:2], 8).targets.shape == (1, 1, 6)


def test_loaders_run_on_one_thread_each():
    data = train_set()
    data.table.images.read = lambda row: np.full(
        (SIDE, SIDE, 3), [cv2.getNumThreads(), torch.get_num_threads(), 7], np.uint8
    )
    plain = TrainSet(data.table, SIDE, NoAugment(), seed=0, epochs=1)
    step = next(train_steps(plain, Plan(2, 1, 0, workers=1), 0))
    assert step.micro_batches[0].images[0, :, 0, 0].tolist() == [1, 1, 7]


def test_workers_leave_the_training_process_its_core(monkeypatch):
    def on(cores, processes, workers="auto"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        return resolve_workers(workers, processes)

    assert [on(cores, 1) for cores in (1, 2, 4, 8, 64)] == [0, 0, 3, 7, 8]
    assert [on(16, processes) for processes in (2, 4, 8, 16)] == [7, 3, 1, 1]
    assert on(2, 1, workers=5) == 5
