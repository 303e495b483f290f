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
    """Stop like a trainer: note the signal, return the code that says `saved`."""
    received = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: received.append(number))
    os.write(1, f"ready {os.getpid()}\n".encode())  # at once: two processes share the pipe
    while not received:
        time.sleep(0.05)
    return 130 if received[0] == signal.SIGINT else 75


def stop_rank_0(_, place, objects):
    """Stop rank 0 as a debugger does, while the others wait for it."""
    dist.barrier()
    if place.rank == 0:
        time.sleep(1.5)  # the others have heard of it since
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    return 0
