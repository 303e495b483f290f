"""What started processes run in test_launch: functions, because a name has to find them."""

import os
import signal
import time

import torch
import torch.distributed as dist

from visiontrain.core.errors import DataError


def agree(run_json, place, objects):
    """Check the group, then return the code that the caller wants."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones.item() == place.world == dist.get_world_size()
    assert place.shard == (place.rank, place.world)
    assert place.is_main == (place.rank == 0)
    assert torch.get_num_threads() == 1
    return int(run_json)


def crash(run_json, place, objects):
    """Fail on the last rank while the others wait for it."""
    if place.rank == place.world - 1:
        if run_json == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"user": DataError, "bug": KeyError}[run_json]("data: empty; give some")
    dist.barrier()
    return 0


def wait(run_json, place, objects):
    """Say which signals come; stop like a trainer at the last of so many, with its code."""
    received = []

    def note(number, _):
        received.append(number)
        say(f"got {signal.Signals(number).name}")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, note)
    say(f"ready {os.getpid()}")
    while len(received) < int(run_json):
        time.sleep(0.05)
    return 130 if received[-1] == signal.SIGINT else 75


def say(line):
    """Print at once: two processes share the pipe."""
    os.write(1, f"{line}\n".encode())


def stop_rank_0(_, place, objects):
    """Stop rank 0 as a debugger does, while the others wait for it."""
    dist.barrier()
    if place.rank == 0:
        time.sleep(1.5)  # the others have heard of it since
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    return 0
