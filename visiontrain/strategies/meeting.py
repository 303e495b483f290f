"""Where processes that a launcher started find each other, before they form a group."""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.attempt import named
from visiontrain.strategies.environment import LOOPBACK, Launched, launched, talk_through

PATIENCE = timedelta(hours=1)  # with rank 0, which may have to write a large cache
ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of Linux's netdevice(7)


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where all processes met."""

    store: dist.Store  # what dead processes left in it is out of sight
    told: Launched  # what is known of this process
    kept: Mapping[str, str]  # by `attempt.keep`, before the processes were started again


@cache
def meeting() -> Meeting:
    """Meet the other processes in a store. Collective.

    Kept for the process's life: without torchrun's agent the store lives in rank 0.

    Raises:
        ConfigError: the store's port is taken, or no launcher started this process.
        RankError: some processes did not come.
    """
    told = launched()
    if told is None:
        raise ConfigError("strategy: no launcher started this process; leave the starting to us")
    store = _store(told)
    name, kept = named(store, told)
    store = dist.PrefixStore(name, store)
    if told.local_world is None:
        told = _located(store, told)
    if told.is_alone:
        talk_through(_loopback(), only=True)
    elif (interface := _interface(store, told)) is not None:
        talk_through(interface, only=False)
    return Meeting(store, told, kept)


def located() -> Launched | None:
    """Return what a launcher told this process, completed by asking the others. Collective."""
    told = launched()
    return told if told is None or told.local_world is not None else meeting().told


def listen(port: int = 0) -> tuple[int, int]:
    """Listen on the loopback for a store, whose own socket would hear all interfaces.

    Args:
        port: which one; 0: any that is free.

    Returns:
        The socket's descriptor, which the store will close, and its port.
    """
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen()
        port = listener.getsockname()[1]
        return listener.detach(), port


def _store(told: Launched) -> dist.Store:
    if dist.is_initialized():  # as under Ray Train, which has formed a group already
        return dist.PrefixStore("visiontrain", _get_default_store())
    if told.has_agent:
        store = next(rendezvous("env://", timeout=PATIENCE))[0]
        while isinstance(store, dist.PrefixStore):  # torch's own, which differs by attempt
            store = store.underlying_store
        return store
    descriptor, port = None, told.port
    try:
        if told.rank == 0 and told.address.startswith("127."):
            descriptor, port = listen(told.port if told.world > 1 else 0)
        return dist.TCPStore(
            told.address,
            port,
            told.world,
            is_master=told.rank == 0,
            timeout=PATIENCE,
            master_listen_fd=descriptor,
        )
    except (OSError, dist.DistNetworkError) as error:
        raise ConfigError(
            f"MASTER_PORT: {told.port} of {told.address} cannot be used "
            f"({str(error).splitlines()[0]}); set another in every process"
        ) from error


# -- this machine among others -----------------------------------------------------------


def _located(store: dist.Store, told: Launched) -> Launched:
    """Find out which processes share this machine, where the launcher does not tell."""
    machines = _all(store, told, "machine", machine())
    here = [rank for rank, other in enumerate(machines) if other == machines[told.rank]]
    rank = here.index(told.rank) if told.local_rank is None else told.local_rank
    return replace(told, local_rank=rank, local_world=len(here))


def machine() -> str:
    """Name what processes have to share to reach each other through the loopback."""
    parts = [socket.gethostname()]
    if sys.platform == "linux":  # two machines or containers may bear one name
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/net").readlink()))
    return " ".join(parts)


def _all(store: dist.Store, told: Launched, topic: str, mine: str) -> list[str]:
    """Return what every process says of a topic, in rank order. Collective."""
    keys = [f"{topic}/{rank}" for rank in range(told.world)]
    store.set(keys[told.rank], mine)
    store.wait(keys, PATIENCE)
    return [value.decode() for value in store.multi_get(keys)]


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return next(name for name in names if name.startswith("lo"))


def _interface(store: dist.Store, told: Launched) -> str | None:
    """Return the network interface that leads to the other machines; None where unknown.

    gloo takes that of the own host's name, which many systems call 127.0.1.1 themselves.
    """
    mine = _way_to(told.address)
    addresses = _all(store, told, "address", mine)
    if mine.startswith("127."):  # so that rank 0's own name leads nowhere, but others' do
        mine = next((_way_to(a) for a in addresses if a and not a.startswith("127.")), "")
    return _interface_of(mine)


def _way_to(host: str) -> str:
    """Return the own IPv4 address that packets to a host leave from; empty where none do."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return probe.getsockname()[0]
    except OSError:
        return ""


def _interface_of(address: str) -> str | None:
    if sys.platform != "linux":
        return None
    import fcntl  # noqa: PLC0415

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, ADDRESS_OF_INTERFACE, request)
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
