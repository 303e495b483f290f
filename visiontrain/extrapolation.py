"""How fast a training would go on many devices, predicted in every mode from one device here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from visiontrain.core.errors import ConfigError
from visiontrain.measuring import facts_of, work_of
from visiontrain.recipe import Run
from visiontrain.strategies import speeds
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.cuts import starts
from visiontrain.strategies.forecast import Facts
from visiontrain.strategies.links import NVLINK, Network, link_of
from visiontrain.strategies.speeds import EVERY, Speed, Work
from visiontrain.strategies.stage import PER_PROCESS
from visiontrain.strategies.staged import staged_of

COUNTS = (8, 64, 512)


@dataclass(frozen=True, slots=True)
class Scale:
    """What is asked: on how many devices, linked how."""

    links: Sequence[str]  # each as `links.link_of` reads it
    counts: Sequence[int] = COUNTS
    per_node: int = 1  # devices of a machine, among which the link is NVLink's

    def networks(self) -> list[Network]:
        """Return a network for each link.

        Raises:
            ConfigError: one is none.
        """
        within = NVLINK if self.per_node > 1 else None
        return [Network(link_of(text), within, self.per_node) for text in self.links]


@dataclass(frozen=True, slots=True)
class Extrapolation:
    """Predictions. Nothing of them was measured but the step of one device."""

    images: int  # of each device in a step
    step_s: float  # of one device
    here: bool  # whether that was measured on this machine
    per_node: int
    speeds: Sequence[Speed]  # by link, then mode, then devices

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """Return tables for people."""
        where = "measured here" if self.here else "as it was given"
        nodes = f", {self.per_node} devices on NVLink in a machine" if self.per_node > 1 else ""
        counts = sorted({each.devices for each in self.speeds})
        lines = [
            f"predicted, not measured: images/s and efficiency of W devices with {self.images} "
            f"images each, from {self.step_s:.3g} s a step of one ({where}){nodes}"
        ]
        for link in dict.fromkeys(each.link for each in self.speeds):
            head = "".join(f"{f'W={count}':>18}" for count in counts)
            lines.append(f"{link:26}{head}")
            mine = [each for each in self.speeds if each.link == link]
            for mode in dict.fromkeys(each.mode for each in mine):
                of = {each.devices: each for each in mine if each.mode == mode}
                cells = "".join(_cell(of.get(count)) for count in counts)
                lines.append(f"  {mode:24}{cells}")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return all of it: seconds, bytes per step, and the bounds of each prediction."""
        return {
            "prediction": True,
            "images": self.images,
            "step_s": self.step_s,
            "step_measured_here": self.here,
            "per_node": self.per_node,
            "speeds": [asdict(each) for each in self.speeds],
        }


def extrapolate(
    run: Run,
    devices: int,
    scale: Scale,
    facts: Facts | None = None,
    step_s: float | None = None,
) -> Extrapolation:
    """Measure a step of one device, and predict every mode on many with as large shares.

    Args:
        run: the training; pipelines are predicted if it is one, with its stages named.
        devices: that its batch is dealt to, of all pipelines together.
        scale: what is asked.
        facts: of the run's blocks, where they were measured already.
        step_s: seconds of a step of one device on its share, where that was measured elsewhere:
            all parts of a step here are brought to it.

    Raises:
        ConfigError: a link is none.
        VisiontrainError: the training cannot be.
    """
    networks = scale.networks()
    share = -(-run.batch // devices)
    facts = facts or facts_of(run)
    work = work_of(run, facts, share)
    if step_s is not None:
        work = work.at(step_s)
    found = []
    for network in networks:
        found += _data_parallel(work, network, scale.counts)
        if isinstance(run.strategy, Pipeline):
            depth = devices // run.strategy.data_parallel
            found += _pipelines(work, network, scale.counts, facts, (depth, run.strategy))
    here = step_s is None
    return Extrapolation(share, work.seconds, here, scale.per_node, found)


def _data_parallel(work: Work, network: Network, counts: Sequence[int]) -> Iterator[Speed]:
    for mode in (speeds.ddp, speeds.powersgd, speeds.fsdp, speeds.parameter_server):
        yield from (mode(work, network, count) for count in counts)
    for seldom in (speeds.local_sgd, speeds.federated):
        yield from (seldom(work, network, count, EVERY) for count in counts)


def _pipelines(
    work: Work,
    network: Network,
    counts: Sequence[int],
    facts: Facts,
    cut: tuple[int, Pipeline],
) -> Iterator[Speed]:
    """Predict pipelines side by side, on counts that are multiples of their depth."""
    depth, config = cut
    stages = PER_PROCESS[config.schedule] * depth
    assert config.stages != "auto"
    first = starts([cost.name for cost in facts.costs], config.stages, stages)
    for count in counts:
        if count % depth == 0:
            # Some pipeline stands on two machines if those have no room for whole ones.
            whole = count <= network.per_node or network.per_node % depth == 0
            inside = network if whole else Network(network.between)
            staged = staged_of(facts, work, inside, depth, config, first)
            yield speeds.pipeline(work, network, count, staged)


def _cell(known: Speed | None) -> str:
    return f"{'-':>18}" if known is None else f"{known.images_per_s:12.4g}{known.efficiency:6.0%}"


def check_scale(scale: Scale) -> None:
    """Refuse links and counts that mean nothing.

    Raises:
        ConfigError: naming the key.
    """
    scale.networks()
    for count in scale.counts:
        if count < 2:
            raise ConfigError(f"counts: {count}; take 2 devices or more")
