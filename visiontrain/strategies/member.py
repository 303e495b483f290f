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
from visiontrain.core.own import Objects
from visiontrain.core.types import Place
from visiontrain.strategies.attempt import keep
from visiontrain.strategies.config import Group, Pipeline
from visiontrain.strategies.devices import own_device
from visiontrain.strategies.environment import launched
from visiontrain.strategies.heartbeat import Heartbeat, is_lost
from visiontrain.strategies.meeting import PATIENCE, Meeting, meeting

Entry = Callable[[str, Place, Objects], int]  # (run as JSON, place, the user's objects)
LAST_WORD = timedelta(minutes=1)  # for the others to hear why rank 0 ends
TAIL = 12  # lines of a failed rank's traceback that are shown
# What code does wrong, of the user's or ours, it does each time; machines fail by other errors.
MISTAKES = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
_turn, _group = count(), count()


def join(config: Group, device: str, entry: Entry, run_json: str, objects: Objects) -> int:
    """Join the group that the environment describes, run `entry`, leave; return its exit code.

    Raises:
        ConfigError: somebody has formed a group that cannot be used.
        RankError: another rank hangs; the message names it, and where it is.
    """
    met = meeting()
    told = met.told
    local = own_device(device, told)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    shard = share_of(config, told.rank, told.world)
    main = told.rank == 0
    place = Place(local, told.rank, told.world, shard, main, told.local_world)
    with Heartbeat(met.store, told, config.timeout_s) as heartbeat:
        try:
            return _work(heartbeat, local, lambda: entry(run_json, place, objects))
        except Exception as error:
            cause = heartbeat.cause(error)
            if cause is None:
                raise
            raise cause from error


def share_of(config: Group, rank: int, world: int) -> tuple[int, int]:
    """Return which share of each batch a rank reads: index, and how many there are."""
    if isinstance(config, Pipeline):
        depth = world // config.data_parallel
        return rank // depth, config.data_parallel
    return rank, world


def _work(heartbeat: Heartbeat, local: torch.device, entry: Callable[[], int]) -> int:
    """Be a member of the group while `entry` runs."""
    is_ours = not dist.is_initialized()
    if is_ours:
        _form(heartbeat, local)
    elif "gloo" not in dist.get_backend_config():
        raise ConfigError(
            f"strategy: there is a group that speaks {dist.get_backend_config()} only; form it "
            "with the backend cpu:gloo,cuda:nccl"
        )
    code = entry()
    # A second Ctrl-C raised KeyboardInterrupt there: nobody is waited for then.
    heartbeat.rest()  # the store may end with rank 0
    dist.barrier()  # rank 0 writes the results: they are there when any process goes on
    if is_ours:
        dist.destroy_process_group()  # after an error it could wait for ranks that are gone
    return code


def _form(heartbeat: Heartbeat, local: torch.device) -> None:
    is_cuda = local.type == "cuda"
    timeout = timedelta(seconds=heartbeat.wait_s)
    heartbeat.store.set_timeout(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if is_cuda else "gloo",  # flags and JSON never wait for a GPU
        # A group that the same processes formed before has left its addresses in the store.
        store=dist.PrefixStore(f"group/{next(_group)}", heartbeat.store),
        rank=heartbeat.told.rank,
        world_size=heartbeat.told.world,
        timeout=timeout,
        device_id=local if is_cuda else None,
    )
    if is_cuda and dist.group.WORLD is not None:
        # Its watchdog ends the process; so that CPUs, which talk apart, first tell who hangs.
        nccl = dist.group.WORLD._get_backend(local)
        nccl._set_default_timeout(timedelta(seconds=2 * heartbeat.timeout_s))


def once(what: str, make: Callable[[str | None], str]) -> str:
    """Return the text that rank 0 makes, in every process that a launcher started.

    The text travels through the store they meet in: which group to join is only known from it.

    Args:
        what: names the text: a script may ask for several.
        make: takes the text that was made before torchrun started the processes again, or None.

    Raises:
        VisiontrainError: in every process, what `make` raised in rank 0.
    """
    told = launched()
    if told is None or (told.world == 1 and told.scratch is None):
        return make(None)
    met, key = meeting(), f"{what}/{next(_turn)}"
    made = _heard(met, key) if met.told.rank else _made(met, key, make)
    keep(met.told, key, made)
    return made


def _made(met: Meeting, key: str, make: Callable[[str | None], str]) -> str:
    try:
        made = make(met.kept.get(key))
    except Exception as error:
        met.store.set(key, json.dumps(describe(error)))
        with suppress(dist.DistError):  # they may be gone already
            met.store.wait([f"{key}/{other}" for other in range(1, met.told.world)], LAST_WORD)
        raise
    met.store.set(key, json.dumps({"made": made}))
    return made


def _heard(met: Meeting, key: str) -> str:
    met.store.wait([key], PATIENCE)
    report = json.loads(met.store.get(key))
    met.store.set(f"{key}/{met.told.rank}", "")
    if "made" not in report:
        raise error_again(report, f"rank 0 of {met.told.world}")
    return report["made"]


def describe(error: BaseException) -> dict[str, Any]:
    """Put an error into JSON, for `error_again` in another process."""
    text = "".join(traceback.format_exception(error))
    kept = [line for line in text.splitlines() if line.strip(" ~^")][-TAIL:]
    return {
        "kind": type(error).__name__,
        "message": str(error),
        "traceback": kept,
        "lasting": isinstance(error, MISTAKES),
        # When a rank goes, the others fail too, in their next collective.
        "follows": is_lost(error),
        "time": time.time(),
    }


def error_again(report: dict[str, Any], who: str) -> VisiontrainError:
    """Make a rank's error again: for the user as it was, any other with its traceback."""
    kind, message = report["kind"], report["message"]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, VisiontrainError):
        return own(message)
    tail = "\n".join(report["traceback"])
    text = f"{who}: {kind}: {message}; its traceback ends with\n{tail}"
    return RankError(text, lasting=report["lasting"])
