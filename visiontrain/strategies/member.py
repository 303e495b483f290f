"""A process among others: joining their group, agreeing on a run, telling how it failed."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from visiontrain.core import errors
from visiontrain.core.errors import ConfigError, RankError, VisiontrainError
from visiontrain.core.types import Place
from visiontrain.strategies.config import Group, Pipeline
from visiontrain.strategies.devices import own_device
from visiontrain.strategies.environment import Launched, launched
from visiontrain.strategies.meeting import PATIENCE, meeting

Entry = Callable[[str, Place], int]
LAST_WORD = timedelta(minutes=1)  # for the others to hear why rank 0 ends
TAIL = 12  # lines of a failed rank's traceback that are shown
LOST = ("gloo", "pair closure")  # in errors of a collective whose peer is gone
_turn = count()


def join(config: Group, device: str, entry: Entry, run_json: str) -> int:
    """Join the group that the environment describes, run `entry`, leave; return its exit code.

    Raises:
        ConfigError: somebody has formed a group that cannot be used.
    """
    store, told = meeting()
    local = own_device(device, told)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    is_ours = not dist.is_initialized()
    if is_ours:
        _form(config, local, store, told)
    elif "gloo" not in dist.get_backend_config():
        raise ConfigError(
            f"strategy: there is a group that speaks {dist.get_backend_config()} only; form it "
            "with the backend cpu:gloo,cuda:nccl"
        )
    shard = (0, 1) if isinstance(config, Pipeline) else (told.rank, told.world)
    main = told.rank == 0
    code = entry(run_json, Place(local, told.rank, told.world, shard, main, told.local_world))
    # A second Ctrl-C raised KeyboardInterrupt there: nobody is waited for then.
    dist.barrier()  # rank 0 writes the results: they are there when any process goes on
    if is_ours:
        dist.destroy_process_group()  # after an error it could wait for ranks that are gone
    return code


def _form(config: Group, local: torch.device, store: dist.Store, told: Launched) -> None:
    is_cuda = local.type == "cuda"
    timeout = timedelta(seconds=config.timeout_s)
    store.set_timeout(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",  # flags and JSON never wait for a GPU
        # A group that the same processes formed before has left its addresses in the store.
        store=dist.PrefixStore(f"visiontrain/{told.attempt}/group/{next(_turn)}", store),
        rank=told.rank,
        world_size=told.world,
        timeout=timeout,
        device_id=local if is_cuda else None,
    )


def once(make: Callable[[], str]) -> str:
    """Return the text that rank 0 makes, in every process that a launcher started.

    The text travels through the store they meet in: which group to join is only known from it.

    Raises:
        VisiontrainError: in every process, what `make` raised in rank 0.
    """
    told = launched()
    if told is None or told.world == 1:
        return make()
    store, told = meeting()
    # The store outlives a restart by torchrun: what an earlier attempt left must not be read.
    key = f"visiontrain/{told.attempt}/{next(_turn)}"
    if told.rank:
        store.wait([key], PATIENCE)
        report = json.loads(store.get(key))
        store.set(f"{key}/{told.rank}", "")
        if "made" not in report:
            raise error_again(report, f"rank 0 of {told.world}")
        return report["made"]
    try:
        made = make()
    except Exception as error:
        store.set(key, json.dumps(describe(error)))
        with suppress(dist.DistError):  # they may be gone already
            store.wait([f"{key}/{other}" for other in range(1, told.world)], LAST_WORD)
        raise
    store.set(key, json.dumps({"made": made}))
    return made


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
