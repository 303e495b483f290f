"""Links between devices, and how long collectives take on them.

A message of n bytes takes latency + n / bandwidth seconds (Hockney 1994, "alpha" and "beta").
A link carries as much each way at the same time; every device, or every machine of several, has
one. Collectives go in rings (Patarasu and Yuan 2009), whose speed is that of the slowest link.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from visiontrain.core.errors import ConfigError

UNITS = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8}  # bytes per second
# Latencies of links that are given by their rate alone, seconds: lines between sites, Ethernet
# with TCP, Ethernet with RDMA. Orders of magnitude, not measurements.
LATENCIES = ((1e9 / 8, 5e-3), (25e9 / 8, 50e-6), (float("inf"), 10e-6))
LATENCY_NVLINK, RATE_NVLINK = 3e-6, 300e9  # one way on an A100 (600 GB/s both ways together)


@dataclass(frozen=True, slots=True)
class Link:
    """A connection."""

    name: str
    latency: float  # seconds
    bandwidth: float  # bytes per second, each way

    def seconds(self, size: float) -> float:
        """Return how long a message of `size` bytes takes."""
        return self.latency + size / self.bandwidth


@dataclass(frozen=True, slots=True)
class Network:
    """Machines of `per_node` devices each."""

    between: Link  # of a machine
    within: Link | None = None  # of a device, to others of its machine; None: as between
    per_node: int = 1

    def slowest(self, devices: int) -> Link:
        """Return what a ring over so many devices waits for."""
        return self.within if self.within and devices <= self.per_node else self.between


NVLINK = Link("nvlink", LATENCY_NVLINK, RATE_NVLINK)


def link_of(text: str) -> Link:
    """Read `10gbit`, `50mbit@20ms` or `nvlink`: a rate each way, and how long a message takes.

    Raises:
        ConfigError: it is none of these.
    """
    if text == NVLINK.name:
        return NVLINK
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)(?:@(\d+(?:\.\d+)?)ms)?", text)
    if match is None or not float(match[1]):
        raise ConfigError(f"links: {text!r}; take a rate as 10gbit, 50mbit@20ms, or nvlink")
    bandwidth = float(match[1]) * UNITS[match[2]]
    by_rate = next(latency for below, latency in LATENCIES if bandwidth < below)
    return Link(text, float(match[3]) / 1e3 if match[3] else by_rate, bandwidth)


def pass_round(network: Network, devices: int, size: float, times: int = 1) -> float:
    """Return the seconds of a reduce-scatter or an all-gather of `size` bytes in all.

    (W - 1) (latency + size / (W bandwidth)): each device hands on 1 / W of it W - 1 times. A
    machine's link carries one ring, however many devices the machine has.

    Args:
        network: that it goes over.
        devices: W.
        size: bytes of the whole, of all `times` together.
        times: collectives that it is cut into, each with latencies of its own.
    """
    link = network.slowest(devices)
    return (devices - 1) * (times * link.latency + size / devices / link.bandwidth)


def all_reduce(network: Network, devices: int, size: float, times: int = 1) -> float:
    """Return the seconds of a sum over all devices: a reduce-scatter, then an all-gather.

    2 (W - 1) latency + 2 (W - 1) / W size / bandwidth. Arguments as of `pass_round`.
    """
    return 2 * pass_round(network, devices, size, times)
