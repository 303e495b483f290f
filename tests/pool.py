"""Ranks that live as long as the test session: torch is imported once per rank, not per test."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from visiontrain.core.types import Place
from visiontrain.strategies.member import share_of

DEADLINE_S = 240


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as in the test process
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    timeout = timedelta(seconds=DEADLINE_S)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)
    while (job := pipe.recv()) is not None:
        try:
            pipe.send((True, job[0](*job[1])))
        except BaseException:  # noqa: BLE001 - the test process reports it
            pipe.send((False, traceback.format_exc()))
        gc.collect()  # models of earlier tests hang in cycles, gigabytes of them
    dist.destroy_process_group()


def be_process(mode: Any, entry: Callable[..., int], text: str, objects: Any, folder: Path) -> int:
    """Be what `launch.run` starts in `folder`: call `entry` at this rank's place under a mode."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = Place(torch.device("cpu"), rank, world, share_of(mode, rank, world), rank == 0)
    with contextlib.chdir(folder):  # where a process that is started would be
        return entry(text, place, objects)


class Ranks:
    """`ranks.run(fn, *args)` calls the module's function `fn` on every rank at once."""

    def __init__(self, world: int) -> None:
        self.world = world
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = mp.get_context("spawn")
        ends = [context.Pipe() for _ in range(world)]
        self._pipes = [mine for mine, _ in ends]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, port, ends[rank][1]), daemon=True)
            for rank in range(world)
        ]
        for process in self._processes:
            process.start()

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """Return the results in rank order; a failure ends the pool: others may hang in it."""
        for pipe in self._pipes:
            pipe.send((fn, args))
        end = time.monotonic() + DEADLINE_S
        waiting, results = dict(enumerate(self._pipes)), {}
        while waiting:
            for pipe in wait(list(waiting.values()), timeout=max(0.0, end - time.monotonic())):
                rank = self._pipes.index(pipe)
                ok, results[rank] = pipe.recv()
                del waiting[rank]
                if not ok:
                    self.kill()
                    pytest.fail(f"rank {rank} failed:\n{results[rank]}")
            if waiting and time.monotonic() > end:
                self.kill()
                pytest.fail(f"ranks {sorted(waiting)} did not answer in {DEADLINE_S} s")
        return [results[rank] for rank in range(self.world)]

    @property
    def alive(self) -> bool:
        """Tell whether every rank can take a job."""
        return all(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """End the ranks at once."""
        for process in self._processes:
            process.kill()
            process.join()

    def close(self) -> None:
        """Let the ranks end in order."""
        if self.alive:
            for pipe in self._pipes:
                pipe.send(None)
            for process in self._processes:
                process.join(10)
        self.kill()
