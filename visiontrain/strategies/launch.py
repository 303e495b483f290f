"""Start the processes that a mode needs, pass signals on, bring their exit code back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from visiontrain.core.errors import RankError
from visiontrain.core.own import NONE, Objects
from visiontrain.core.types import Place
from visiontrain.strategies.config import (
    DDP,
    FSDP,
    Alone,
    Group,
    Pipeline,
    Placement,
    StrategyConfig,
)
from visiontrain.strategies.devices import devices, let_go, threads
from visiontrain.strategies.environment import LOOPBACK, RESTARTED, cpu_threads, launched
from visiontrain.strategies.handover import hand_over, handed_over
from visiontrain.strategies.meeting import located
from visiontrain.strategies.member import Entry, describe, error_again, join
from visiontrain.strategies.rendezvous import LOOPBACK_ONLY, register
from visiontrain.strategies.stage import stages_of

SAVING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # workers save and stop
_tell = logging.getLogger(__name__).warning
GROUPS = {"ddp": DDP, "fsdp": FSDP, "pipeline": Pipeline}
# Workers start from here, not through multiprocessing: that would import the user's script again,
# which runs away without a main guard and does not exist in a notebook.
BOOT = (
    "import json, sys; job = json.load(open(sys.argv[1])); sys.path[:] = job['path']; "
    "from visiontrain.strategies.launch import child; child(job)"
)


def run(
    config: StrategyConfig, device: str, entry: Entry, run_json: str, objects: Objects = NONE
) -> int:
    """Call `entry(run_json, place, objects)` in every process of the mode; return its exit code.

    One device runs in this process. Other modes start `config.processes` of them through torch
    elastic, or, under a launcher, join the processes that it started. When one of those started
    here is killed, crashes or hangs, all are started again, `config.max_restarts` times at most;
    `entry` goes on from whatever it left.

    Args:
        config: the mode.
        device: as `devices` reads it.
        entry: a module's function; it is imported anew in every process.
        run_json: handed to `entry`.
        objects: of the user's, handed to `entry`.

    Raises:
        ConfigError: an object cannot be handed to another process.
        RankError: a process failed; the message names its rank and ends with its traceback.
        VisiontrainError: whatever `entry` raised for the user.
    """
    if isinstance(config, Alone):
        *before, last = devices(device) if isinstance(config, Placement) else devices(device)[:1]
        try:
            return entry(run_json, Place(last, before=tuple(before)), objects)
        finally:
            let_go()
    let_go()
    told = located()
    if told is not None:
        count = config.threads or cpu_threads(told.local_world or told.world)
        if count:
            torch.set_num_threads(count)
        return join(config, device, entry, run_json, objects)
    with tempfile.TemporaryDirectory(prefix="visiontrain-") as folder:
        hand_over(objects, Path(folder))
        return _start(config, device, entry, run_json, Path(folder))


# -- a started process -----------------------------------------------------------------


def child(job: dict[str, Any]) -> None:
    """Be one started process: run, and leave the exit code or the error in a file.

    Elastic ends all processes when one exits with a code, so this one exits with 0 unless it
    failed, and its code travels in the file.
    """
    told = launched()
    assert told is not None
    rank, folder = told.rank, Path(job["folder"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    threading.Thread(target=_follow, args=(job["parent"], folder), daemon=True).start()
    if (folder / "signal").exists():
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the entry knows how to save
    torch.set_num_threads(job["threads"])
    config = GROUPS[job["config"]["kind"]](**job["config"])
    module, name = job["entry"]
    try:
        call = getattr(import_module(module), name)
        code = join(config, job["device"], call, job["run"], handed_over(folder))
        report: dict[str, Any] = {"code": code}
    except KeyboardInterrupt:
        report = {"code": 128 + signal.SIGINT}
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        report = describe(error)
    partial = folder / f"partial-{rank}"
    partial.write_text(json.dumps(report))
    partial.rename(folder / f"rank-{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if "code" in report else 1)  # a broken process group can hang in its destructor


def _follow(parent: int, folder: Path) -> None:
    """End this process when its parent is gone, however it went: nobody would stop it."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(137)


# -- the parent -----------------------------------------------------------------------


def _start(config: Group, device: str, entry: Entry, run_json: str, folder: Path) -> int:
    """Start the processes, and again while they fail otherwise than by a mistake of the user's."""
    job = {
        "path": sys.path,
        "parent": os.getpid(),
        "folder": str(folder),
        "config": config.model_dump(),
        "device": device,
        "threads": threads(config),
        "entry": [entry.__module__, entry.__qualname__],
        "run": run_json,
    }
    (folder / "job.json").write_text(json.dumps(job))
    with _forward_signals(folder) as received:
        for restart in count(1):
            try:
                return _attempt(config, folder, received)
            except RankError as error:  # others are the same every time
                if received or error.lasting or restart > config.max_restarts:
                    raise
                RESTARTED.append(str(error))
                _tell(f"restart {restart} of {config.max_restarts}, as {error}")
            for path in (*folder.glob("pid-*"), *folder.glob("rank-*.json")):
                path.unlink()
    raise AssertionError  # count() never ends


def _attempt(config: Group, folder: Path, received: list[int]) -> int:
    """Start the processes once, wait for them, judge how they ended.

    Elastic would start them again whatever they ended with, so it is told not to.
    """
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.processes,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "elastic")),
        run_id="visiontrain",
        rdzv_backend=LOOPBACK_ONLY,
        local_addr=LOOPBACK,
        max_restarts=0,
        signals_to_handle=",".join(_handled()),
    )
    exits: dict[int, int] = {}
    register()
    with _quiet_elastic():
        try:
            elastic_launch(settings, sys.executable)("-c", BOOT, str(folder / "job.json"))
        except ChildFailedError as error:
            exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException as error:
            return 128 + error.sigval
    return _verdict(config, folder, exits, received)


def _handled() -> Iterator[str]:
    """Name what ends the processes with this one; not what nohup ignores for all of them."""
    for name in ("SIGHUP", "SIGQUIT"):
        if signal.getsignal(signal.Signals[name]) != signal.SIG_IGN:
            yield name


def _verdict(config: Group, folder: Path, exits: dict[int, int], received: list[int]) -> int:
    """Return the common exit code, or raise what went wrong first."""
    world = config.processes
    paths = {rank: folder / f"rank-{rank}.json" for rank in range(world)}
    reports = {r: json.loads(path.read_text()) for r, path in paths.items() if path.exists()}
    codes = [report["code"] for report in reports.values() if "code" in report]
    if len(codes) == world:
        return max(codes)
    failed = {rank: report for rank, report in reports.items() if "code" not in report}
    causes = {rank: report for rank, report in failed.items() if not report["follows"]}
    if received and not causes:
        return 128 + received[0]  # ended by the signal, before there was anything to save
    silent = {rank: code for rank, code in exits.items() if rank not in reports}
    if silent and not causes:
        # Elastic ends the others by SIGTERM.
        rank, code = min(silent.items(), key=lambda item: item[1] == -signal.SIGTERM)
        if -code in SAVING:
            return 128 - code  # sent to this one alone, likewise
        raise RankError(f"{_named(config, rank)}: {_ending(code)}")
    if not failed:
        raise RankError(f"ranks of {world}: ended without a word; their exit codes are {exits}")
    # A rank that only lost its peer did not fail first.
    rank = min(causes or failed, key=lambda rank: failed[rank]["time"])
    raise error_again(failed[rank], _named(config, rank))


def _named(config: Group, rank: int) -> str:
    """Name a rank; in a pipeline, what it holds as well."""
    name = f"rank {rank} of {config.processes}"
    if not isinstance(config, Pipeline):
        return name
    depth = config.processes // config.data_parallel
    first = ["", *([] if config.stages == "auto" else config.stages)]
    numbers = stages_of(rank % depth, config.schedule, depth)
    held = [f"stage {n}" + (f" from {first[n]}" if 0 < n < len(first) else "") for n in numbers]
    return f"{name}, {' and '.join(held)}"


def _ending(code: int) -> str:
    """Say in words how a process ended that left no report."""
    if code >= 0:
        return f"ended without a word, with exit code {code}"
    name = signal.Signals(-code).name
    return f"ended by {name}" + ("; was memory short?" if name == "SIGKILL" else "")


@contextmanager
def _forward_signals(folder: Path) -> Iterator[list[int]]:
    """Pass signals on to the workers, which save; list those that came."""
    received: list[int] = []

    def forward(number: int, _: Any) -> None:
        received.append(number)
        (folder / "signal").write_text(str(number))  # for processes that are still starting
        for path in folder.glob("pid-*"):
            text = path.read_text()
            if text and not (folder / f"rank-{path.name[4:]}.json").exists():
                with suppress(ProcessLookupError):  # it has just died
                    os.kill(int(text), number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    # Elastic sets the last two and leaves them.
    before = {n: signal.getsignal(n) for n in (*SAVING, signal.SIGHUP, signal.SIGQUIT)}
    for number in SAVING:
        signal.signal(number, forward)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Keep elastic's reports of failed workers from the terminal: RankError says it better."""
    prefix = "torch.distributed.elastic"
    loggers = [
        logging.getLogger(n) for n in logging.root.manager.loggerDict if n.startswith(prefix)
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
