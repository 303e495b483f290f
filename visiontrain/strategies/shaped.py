"""Two hosts on this machine with a slow link between them, which the kernel makes.

Each host is a network namespace; a pair of virtual Ethernet devices joins them, and each end sends
through a token bucket (`tc qdisc ... tbf`). All of it is gone when the context ends, however it
does; what a killed process left is removed when the next begins. Linux, as root.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from visiontrain.core.errors import VisiontrainError

PREFIX = "vtlink"  # of namespaces, followed by the process that made them
BURST = "16kb"  # that may go at once; a full Ethernet frame has to fit
WAIT = "200ms"  # that a packet may wait in the bucket's queue before it is dropped


class NotMeasuredError(VisiontrainError):
    """This machine, or this user, cannot have such a link; says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """One end."""

    namespace: str
    interface: str
    address: str
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, module: str, words: Sequence[str], **env: str) -> subprocess.Popen[str]:
        """Start a Python module there; its output is a pipe, its errors are this process's."""
        inside = ["ip", "netns", "exec", self.namespace]
        paths = os.pathsep.join(path for path in sys.path if path)
        known = {"PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": self.interface}
        process = subprocess.Popen(  # noqa: S603 - our own module
            [*inside, sys.executable, "-m", module, *words],
            env=os.environ | known | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process


@contextmanager
def linked(rate: str) -> Iterator[tuple[Host, Host]]:
    """Join two hosts by a link.

    Args:
        rate: of each way, as `tc` writes it: 10mbit.

    Raises:
        NotMeasuredError: no rights, no tools, or not this kernel.
    """
    reason = refusal()
    if reason is not None:
        raise NotMeasuredError(reason)
    sweep()
    own = os.getpid()
    hosts = [
        Host(f"{PREFIX}-{own}-{n}", f"vtl{own % 1_000_000}-{n}", f"10.98.0.{n}") for n in (1, 2)
    ]
    try:
        for host in hosts:
            _must("ip", "netns", "add", host.namespace)
        first, second = ([host.interface, "netns", host.namespace] for host in hosts)
        _must("ip", "link", "add", *first, "type", "veth", "peer", "name", *second)
        for host in hosts:
            inside, device = ("-n", host.namespace), host.interface
            _must("ip", *inside, "addr", "add", f"{host.address}/24", "dev", device)
            for name in (device, "lo"):
                _must("ip", *inside, "link", "set", name, "up")
            bucket = ["tbf", "rate", rate, "burst", BURST, "latency", WAIT]
            _must("tc", *inside, "qdisc", "add", "dev", device, "root", *bucket)
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            for process in host.started:  # also one that has yet to enter
                process.kill()
            remove(host.namespace)


def refusal() -> str | None:
    """Return why there can be no such link here, as far as it shows without trying."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid():
        return "network namespaces and tc need root"
    missing = [name for name in ("ip", "tc") if not shutil.which(name)]
    return f"no {missing[0]} here; it is part of iproute2" if missing else None


def sweep() -> None:
    """Remove what processes left that were killed."""
    for line in _call("ip", "netns", "list").stdout.splitlines():
        match = re.match(rf"{PREFIX}-(\d+)-\d\b", line)
        if match and not Path(f"/proc/{match[1]}").exists():
            remove(match[0])


def remove(namespace: str) -> None:
    """Remove a host with all that runs on it: its end of the link goes with it."""
    for pid in _call("ip", "netns", "pids", namespace).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _call("ip", "netns", "del", namespace)


def _must(*words: str) -> None:
    done = _call(*words)
    if done.returncode:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise NotMeasuredError(f"{' '.join(words[:4])} ...: {said}")


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603


def ended(processes: Mapping[str, subprocess.Popen[str]]) -> dict[str, str]:
    """Wait for processes; return what each wrote.

    Raises:
        VisiontrainError: one failed; the others are ended then.
    """
    try:
        written = {name: process.communicate()[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    for name, process in processes.items():
        if process.returncode:
            raise VisiontrainError(f"{name}: ended with exit code {process.returncode}")
    return written
