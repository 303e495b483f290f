"""A Ray of this process's own, on this machine alone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import worker
from ray._private.ray_constants import ENABLE_RAY_CLUSTER

from visiontrain.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
INTENDED = "IntentionalSystemExit"  # in what Ray prints of an actor that was told to end
STORE_BYTES = 2**30  # shared memory for messages on their way


def start_ray(mode: str, cores: int) -> None:
    """Start it, for so many actors that take a core.

    Raises:
        ConfigError: Ray was imported before, and would listen to other machines.
    """
    if ENABLE_RAY_CLUSTER:
        raise ConfigError(
            f"strategy: {mode}, but Ray was imported here before and would listen to other "
            "machines; start training before `import ray`"
        )
    leave_out_endings()
    with signals_kept():
        ray.init(
            num_cpus=cores,
            _node_ip_address=LOOPBACK,
            object_store_memory=STORE_BYTES,
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=False,
        )


def leave_out_endings() -> None:
    """Keep off the terminal that actors ended which were told to: Ray calls it a failure.

    It prints so although `log_to_driver` is false; all else that it prints stays.
    """
    printed = getattr(worker, "print_to_stdstream", None)
    if printed is None or getattr(printed, "__module__", None) == __name__:
        return

    def prints(data: dict[str, Any], *more: Any, **named: Any) -> None:
        lines = [line for line in data.get("lines", ()) if INTENDED not in str(line)]
        if lines:
            printed({**data, "lines": lines}, *more, **named)

    worker.print_to_stdstream = prints


@contextmanager
def signals_kept() -> Iterator[None]:
    """Take back the handlers of signals that Ray sets."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
