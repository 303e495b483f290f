"""A process among others: joining their group, agreeing on a run, telling how it failed."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from visiontrain.core import errors
from visiontrain.core.errors import RankError, VisiontrainError
from visiontrain.core.types import Place
from visiontrain.strategies.config import Group, Pipeline
from visiontrain.strategies.devices import devices, under_torchrun

Entry = Callable[[str, Place], int]
PATIENCE = timedelta(hours=1)  # with rank 0, which may have to write a large cache
LAST_WORD = timedelta(minutes=1)  # for the others to hear why rank 0 ends
TAIL = 12  # lines of a failed rank's traceback that are shown
LOST = ("gloo", "pair closure")  # in errors of a collective whose peer is gone
_turn = count()


def join(config: Group, device: str, entry: Entry, run_json: str) -> int:
    """Join the group that the environment describes, run `entry`, leave; return its exit code."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = devices(device)[0]
    is_cuda = local.type == "cuda"
    if is_cuda:
        local = devices(device)[int(os.environ.get("LOCAL_RANK", rank))]
        torch.cuda.set_device(local)
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",  # flags and JSON never wait for a GPU
        timeout=timedelta(seconds=config.timeout_s),
        device_id=local if is_cuda else None,
    )
    shard = (0, 1) if isinstance(config, Pipeline) else (rank, world)
    code = entry(run_json, Place(local, rank, world, shard, is_main=rank == 0))
    # A second Ctrl-C raised KeyboardInterrupt there: nobody is waited for then.
    dist.barrier()  # rank 0 writes the results: they are there when any process goes on
    dist.destroy_process_group()  # after an error it could wait for ranks that are gone
    return code


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next(name for name in names if name.startswith("lo"))


def once(make: Callable[[], str]) -> str:
    """Return the text that rank 0 makes, in every process that torchrun started.

    The text travels through the rendezvous' store: which group to join is only known from it.

    Raises:
        VisiontrainError: in every process, what `make` raised in rank 0.
    """
    if not under_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return make()
    store, rank, world = _meeting()
    # The store outlives a restart by torchrun: what an earlier attempt left must not be read.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"visiontrain/{attempt}/{next(_turn)}"
    if rank:
        store.wait([key], PATIENCE)
        report = json.loads(store.get(key))
        store.set(f"{key}/{rank}", "")
        if "made" not in report:
            raise error_again(report, f"rank 0 of {world}")
        return report["made"]
    try:
        made = make()
    except Exception as error:
        store.set(key, json.dumps(describe(error)))
        with suppress(dist.DistError):  # they may be gone already
            store.wait([f"{key}/{other}" for other in range(1, world)], LAST_WORD)
        raise
    store.set(key, json.dumps({"made": made}))
    return made


@cache
def _meeting() -> tuple[dist.Store, int, int]:
    """Return the store that all processes meet in, this one's rank, and how many there are.

    Kept for the process's life: without torchrun's agent the store lives in rank 0, and
    joining the group finds this very one again.
    """
    return next(rendezvous("env://", timeout=PATIENCE))


def describe(error: BaseException) -> dict[str, Any]:
    """Put an error into JSON, for `error_again` in another process."""
    text = "".join(traceback.format_exception(error))
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": text.splitlines()[-TAIL:],
        # When a rank goes, the others fail too, in their next collective.
        "follows": isinstance(error, dist.DistError) or any(t in str(error) for t in LOST),
        "time": time.time(),
    }


def error_again(report: dict[str, Any], who: str) -> VisiontrainError:
    """Make a rank's error again: for the user as it was, any other with its traceback."""
    kind, message = report["kind"], report["message"]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, VisiontrainError):
        return own(message)
    tail = "\n".join(report["traceback"])
    return RankError(f"{who}: {kind}: {message}; its traceback ends with\n{tail}")
