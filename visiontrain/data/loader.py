"""Steps of a run and batches of an evaluation, loaded in processes or here."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import cloudpickle
import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visiontrain.core.errors import VisiontrainError
from visiontrain.core.types import Batch
from visiontrain.data.order import Order
from visiontrain.data.sampler import (
    Key,
    Plan,
    StepKeys,
    step_keys,
    steps_per_epoch,
    unit_keys,
)
from visiontrain.data.table import Table

__all__ = [
    "Plan",
    "Step",
    "blank_steps",
    "eval_batches",
    "resolve_workers",
    "steps_per_epoch",
    "train_steps",
    "unit_steps",
]

PICKS_SIGNALS = sys.platform == "linux"  # elsewhere nothing tells who sent a signal


class Training(Protocol):
    """What a run trains on."""

    @property
    def table(self) -> Table:
        """Images and labels."""
        ...

    @property
    def order(self) -> Order:
        """What epochs are made of."""
        ...

    def __len__(self) -> int: ...

    def cell(self, keys: Sequence[Key], step: int) -> Batch:
        """Return the samples of `keys` (epoch, entry), all of one step; a blank one for none."""
        ...


class Scoring(Protocol):
    """What is scored."""

    @property
    def table(self) -> Table:
        """The truth."""
        ...

    def __len__(self) -> int: ...

    def cell(self, rows: Sequence[int]) -> Batch:
        """Return the images of `rows`; a blank one for none."""
        ...

    def merge(self, rows: Tensor) -> Tensor:
        """Turn an evaluator's rows, those of all ranks, into rows of the table's images."""
        ...


@dataclass(frozen=True, slots=True)
class Step:
    """What one rank trains on in one optimizer step."""

    epoch: int
    step: int  # counted over the whole run, from 0
    images: int  # in the global batch
    micro_batches: Sequence[Batch]


def train_steps(dataset: Training, plan: Plan, start: int) -> Iterator[Step]:
    """Yield every step from `start` to the end of the run; the same for any `plan.workers`."""
    keys = step_keys(len(dataset), plan, start, dataset.order)
    return _load(_Steps(dataset), keys, plan.workers)


def unit_steps(dataset: Training, plan: Plan, units: Iterator[tuple[int, int]]) -> Iterator[Step]:
    """Yield single shares of steps, as they are asked for: (step, share)."""
    keys = unit_keys(len(dataset), plan, units, dataset.order)
    return _load(_Steps(dataset), keys, plan.workers)


def blank_steps(dataset: Training, plan: Plan, start: int) -> Iterator[Step]:
    """Yield every step from `start` on as `train_steps` does, without images."""
    for keys in step_keys(len(dataset), plan, start, dataset.order):
        yield Step(keys.epoch, keys.step, keys.images, ())


def eval_batches(
    dataset: Scoring, batch: int, shard: tuple[int, int], workers: int
) -> Iterator[Batch]:
    """Yield this rank's batches of the one fixed list: batch k goes to rank k mod W.

    Every rank gets equally many, a missing one being an image with valid=0 and id -1: some
    modes must run the model in step.
    """
    index, total = shard
    lists = [range(i, min(i + batch, len(dataset))) for i in range(0, len(dataset), batch)]
    lists += [range(0)] * (-len(lists) % total)
    return _load(_Batches(dataset), iter(lists[index::total]), workers)


def resolve_workers(workers: int | Literal["auto"], processes: int) -> int:
    """Turn `auto` into loader processes per rank: a core each beside the one that trains, to 8.

    On one or two cores, which training fills, the training process loads: handing a step over
    costs more than it saves there (16 mosaics of 160 px: 11 ms of CPU here, 2 + 17 ms with a
    loader; two shared cores of an AMD EPYC, torch 2.14.1, n = 12 steps).
    """
    if workers != "auto":
        return workers
    if _start_method() != "fork":  # each would have pictures of its own, and run scripts again
        return 0
    cores = len(os.sched_getaffinity(0)) if "sched_getaffinity" in dir(os) else os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, max(1, cores // processes - 1))


class _Steps(Dataset[Step]):
    """A step is one item, so that its images are collated where they are loaded."""

    def __init__(self, samples: Training) -> None:
        self.samples = samples

    def __getitem__(self, index: StepKeys) -> Step:
        batches = [self.samples.cell(cell, index.step) for cell in index.cells]
        return Step(index.epoch, index.step, index.images, batches)


class _Batches(Dataset[Batch]):
    def __init__(self, samples: Scoring) -> None:
        self.samples = samples

    def __getitem__(self, index: range) -> Batch:
        return self.samples.cell(index)


def _load(dataset: Dataset[Any], keys: Iterator[Any], workers: int) -> Iterator[Any]:
    """Start reading; yield the items of `keys` in order."""
    # More processes than cores is the user's choice; torch would warn of it in every run.
    warnings.filterwarnings("ignore", "This DataLoader will create .* worker processes")
    loader = DataLoader(
        _Answers(dataset),
        batch_size=None,  # an item is a whole batch already
        sampler=_Keys(keys),
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=_start_method() if workers else None,
    )
    with _sigterm_held():
        answers = iter(loader)
    return _items(answers)


def _start_method() -> str:
    """Return how loaders start: by fork on Linux, also where newer Pythons do not by themselves.

    They share decoded pictures then, and functions of scripts and notebooks are there.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    if sys.platform == "linux" and chosen != "spawn":
        return "fork"
    return chosen or multiprocessing.get_start_method()


@contextmanager
def _sigterm_held() -> Iterator[None]:
    """Block SIGTERM here, so that processes that start meanwhile never had it unblocked.

    Blocked only in `_start_worker`, it would find those that are still starting, and any thread
    that a library started before.
    """
    if not PICKS_SIGNALS:
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _items(answers: Iterator[Any]) -> Iterator[Any]:
    for answer in answers:
        if isinstance(answer, VisiontrainError):
            raise answer
        yield answer


class _Answers(Dataset[Any]):
    """Hands errors for the user over as values: DataLoader would put its traceback into them."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except VisiontrainError as error:
            return error

    def __getstate__(self) -> bytes:
        # To a process that is not forked: functions of a script or notebook go with their code.
        return cloudpickle.dumps(self.dataset)

    def __setstate__(self, state: bytes) -> None:
        self.dataset = pickle.loads(state)  # noqa: S301 - of the process that started this one


class _Keys:
    """An iterator as the one-time sampler that DataLoader wants."""

    def __init__(self, keys: Iterator[Any]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Any]:
        return self.keys


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    """One thread each: loaders run side by side, and beside training.

    Ctrl-C and schedulers signal every process of a run. Only the training process answers:
    without its loaders it could not finish the step after which it saves.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if PICKS_SIGNALS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a spawned one starts without
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # if a thread of a library's unblocks it
        threading.Thread(target=_obey_parent, daemon=True).start()
    # Last: a thread that these start must have the signals blocked, too.
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _obey_parent() -> None:
    """End on SIGTERM from the training process; one from elsewhere is for that to answer."""
    training = multiprocessing.parent_process()  # whose child it is may be a fork server's
    number = os.getppid() if training is None else training.pid
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != number:
        pass
    os._exit(0)
