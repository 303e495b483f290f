"""How fast modes would train on many devices: predictions from one device's measured step.

Shares stay as large as they were measured, so that batches grow with the devices. Every
prediction lies between two bounds: nothing of what travels hides behind computing, or all does
that could. Each function says what travels and when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from visiontrain.strategies.links import Network, all_reduce, pass_round
from visiontrain.strategies.timeline import Timeline

# What hides, of what could. It is chosen by published figures, which lie between the bounds and are
# met within 15 % with a half (Horovod on 16 to 512 GPUs, Goyal et al. 2017 on 256: test_speeds.py).
OVERLAP = 0.5
BUCKET = 25 * 2**20  # bytes that torch's DDP sums at once
EVERY = 20  # steps between meetings of local SGD, and of a federated client in a round
PER_SERVER = 8  # workers for which there is a parameter server


@dataclass(frozen=True, slots=True)
class Work:
    """What one device does in a step on its share, and what it would have to send."""

    forward: float  # seconds
    backward: float  # seconds, until all gradients are there
    rest: float  # seconds: the loss, the optimizer, averages
    images: int  # of its share
    gradients: int  # bytes
    weights: int  # bytes
    gathered: float  # bytes of weights that fsdp gathers for a micro-batch's two passes
    message: int  # bytes of what federated clients and servers send: weights and float buffers
    blocks: int  # that fsdp gathers one by one
    parts: int = 1  # micro-batches one after the other, each of which fsdp gathers weights for
    low_rank: int = 0  # bytes that powersgd sums in place of gradients
    low_rank_s: float = 0.0  # seconds that powersgd computes

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.forward + self.backward + self.rest

    def at(self, seconds: float) -> Work:
        """Return the same where a step takes other time: every part is as much longer or shorter.

        A device that is faster at all of it is what that stands for.
        """
        fit = seconds / self.seconds
        return replace(
            self,
            forward=fit * self.forward,
            backward=fit * self.backward,
            rest=fit * self.rest,
            low_rank_s=fit * self.low_rank_s,
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """A prediction. Nothing of it was measured on so many devices."""

    mode: str
    link: str
    devices: int
    seconds: float  # of a step
    slowest: float  # seconds, if nothing hides
    fastest: float  # seconds, if all hides that can
    images_per_s: float
    efficiency: float  # of `devices` devices that need not talk
    sent: float  # bytes per step, by the device or server that sends most


@dataclass(frozen=True, slots=True)
class Costs:
    """What a step of many devices consists of."""

    computing: float  # seconds in which the slowest device computes or waits for stages
    talking: float  # seconds on the link
    hidden: float  # seconds of these at most in which something is computed
    sent: float  # bytes, by the device or server that sends most


def speed(mode: str, network: Network, devices: int, work: Work, costs: Costs) -> Speed:
    """Put a prediction together."""
    slowest = costs.computing + costs.talking
    seconds = slowest - OVERLAP * costs.hidden
    return Speed(
        mode=mode,
        link=network.between.name,
        devices=devices,
        seconds=seconds,
        slowest=slowest,
        fastest=slowest - costs.hidden,
        images_per_s=devices * work.images / seconds,
        efficiency=work.seconds / seconds,
        sent=costs.sent,
    )


def ddp(work: Work, network: Network, devices: int, bucket: int = BUCKET) -> Speed:
    """Gradients are summed over all devices, in buckets while backward goes on (Li et al. 2020).

    2 (W - 1) / W G bytes; what can hide is as long as the last micro-batch's backward pass.
    """
    talking = all_reduce(network, devices, work.gradients, _buckets(work.gradients, bucket))
    hidden = min(talking, work.backward / work.parts)
    sent = 2 * work.gradients * (devices - 1) / devices
    costs = Costs(work.seconds, talking, hidden, sent)
    return speed("ddp", network, devices, work, costs)


def powersgd(work: Work, network: Network, devices: int) -> Speed:
    """Two low-rank matrices are summed in place of each gradient (Vogels et al. 2019).

    Each of the two sums is waited for, so nothing hides; what is computed for them comes on top.
    """
    times = 2 * _buckets(work.gradients, BUCKET)
    talking = all_reduce(network, devices, work.low_rank, times)
    sent = 2 * work.low_rank * (devices - 1) / devices
    computing = work.seconds + work.low_rank_s
    costs = Costs(computing, talking, 0.0, sent)
    return speed("ddp, powersgd", network, devices, work, costs)


def local_sgd(work: Work, network: Network, devices: int, every: int) -> Speed:
    """Weights and float buffers are averaged every H steps (Stich 2018): 1 / H of a sum a step."""
    talking = all_reduce(network, devices, work.message) / every
    sent = 2 * work.message * (devices - 1) / devices / every
    name = f"ddp, sync_every={every}"
    costs = Costs(work.seconds, talking, 0.0, sent)
    return speed(name, network, devices, work, costs)


def fsdp(work: Work, network: Network, devices: int, *, gloo: bool = False) -> Speed:
    """Weights are gathered for each block's two passes, gradients scattered (Zhao et al. 2023).

    (W - 1) / W (A P + G) bytes, A being micro-batches and P what one gathers, twice the weights if
    all train in their own format. In 2 A + 1 collectives per block; the next block's weights travel
    while one is computed, so all of both passes can hide it. On CPUs gloo scatters by summing
    everywhere (torch 2.14.1, measured), which takes 2 G in place of G; what is sent is told as
    rings would send it, as runs tell it.
    """
    rings = work.parts * work.gathered + work.gradients
    whole = rings + work.gradients if gloo else rings
    talking = pass_round(network, devices, whole, (2 * work.parts + 1) * work.blocks)
    hidden = min(talking, work.forward + work.backward)
    sent = rings * (devices - 1) / devices
    costs = Costs(work.seconds, talking, hidden, sent)
    return speed("fsdp", network, devices, work, costs)


@dataclass(frozen=True, slots=True)
class Staged:
    """A pipeline's step, played with and without the time that sending takes."""

    name: str
    depth: int  # processes of one pipeline
    alone: Timeline  # sending takes no time
    sending: Timeline  # with it, on the network in question
    sent: float  # bytes per step, by the process that sends most
    summed: Sequence[int]  # bytes of each process that go round: scattered, and gathered
    times: int = 1  # scatters, and gathers, into which that is cut


def pipeline(work: Work, network: Network, devices: int, staged: Staged) -> Speed:
    """Activations go from stage to stage, their gradients back, as `timeline.play` has it.

    Pipelines side by side sum each stage's gradients after the step, or gather its weights before
    and scatter its gradients where they share what they hold: nothing of that hides.
    Copies of a stage are `depth` devices apart. So on several machines every ring goes through
    all that have a copy, and a machine's link carries the rings of all stages that stand there.
    `images_per_s` counts the images of all pipelines.
    """
    copies = devices // staged.depth
    ring = Network(network.slowest(devices))
    size = _sharing_a_link(staged.summed, network, devices)
    summing = pass_round(ring, copies, size, 2 * staged.times)
    talking = staged.sending.seconds - staged.alone.seconds + summing
    sent = staged.sent + max(staged.summed) * (copies - 1) / copies
    computing = staged.alone.seconds + work.rest
    costs = Costs(computing, talking, 0.0, sent)
    return speed(staged.name, network, devices, work, costs)


def parameter_server(work: Work, network: Network, workers: int) -> Speed:
    """Workers read all weights, then push all gradients, each step (bsp; Li et al. 2014).

    There is a server for every eight of them. A server's link carries W / N of P and of G, and that
    of a machine with as many workers or more those of its workers; the longer one counts. Reading
    comes before the forward pass and pushing after the backward pass, so nothing hides.

    Args:
        work: of one worker.
        network: where each server has a link of its own.
        workers: W, which are what is counted as devices.
    """
    link, crowd = network.slowest(workers), workers / -(-workers // PER_SERVER)
    if link is network.between:  # the workers of a machine have one link to all servers
        crowd = max(crowd, float(min(network.per_node, workers)))
    talking = link.seconds(crowd * work.weights) + link.seconds(crowd * work.gradients)
    costs = Costs(work.seconds, talking, 0.0, crowd * work.weights)
    name = f"parameter_server, 1:{PER_SERVER}"
    return speed(name, network, workers, work, costs)


def federated(work: Work, network: Network, clients: int, steps: int) -> Speed:
    """Each round the one server sends the weights to K clients, who train and send theirs back.

    (McMahan et al. 2017.) K messages share the server's link, each way: 2 (latency + K M /
    bandwidth) in a round of H steps. Nothing hides, all clients being equally fast.

    Args:
        work: of one client.
        network: where each client is a machine.
        clients: K, which are what is counted as devices.
        steps: H, of a client in a round.
    """
    talking = 2 * network.between.seconds(clients * work.message) / steps
    sent = clients * work.message / steps
    name = f"federated, {steps} steps a round"
    costs = Costs(work.seconds, talking, 0.0, sent)
    return speed(name, network, clients, work, costs)


def _sharing_a_link(sizes: Sequence[int], network: Network, devices: int) -> int:
    """Return the bytes of the stages whose rings share a link: a machine's, or a device's own."""
    if devices <= network.per_node:
        return max(sizes)
    depth, each = len(sizes), network.per_node
    machines = (range(begin, min(begin + each, devices)) for begin in range(0, devices, each))
    return max(sum(sizes[n] for n in {rank % depth for rank in ranks}) for ranks in machines)


def _buckets(size: int, bucket: int) -> int:
    return max(1, -(-size // bucket))
