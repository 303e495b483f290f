"""How fast a training would go on many devices, predicted in every mode from one device here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from visiontrain.core.errors import ConfigError
from visiontrain.measuring import facts_of, work_of
from visiontrain.recipe import Run, Scaled
from visiontrain.report.extrapolated import Extrapolation
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
    gloo: bool = False  # whether they are CPUs, whose gradients fsdp scatters by summing everywhere

    def networks(self) -> list[Network]:
        """Return a network for each link.

        Raises:
            ConfigError: one is none.
        """
        within = NVLINK if self.per_node > 1 else None
        return [Network(link_of(text), within, self.per_node) for text in self.links]


def extrapolate(
    run: Run,
    devices: int,
    scale: Scale,
    facts: Facts | None = None,
    step_s: float | None = None,
    source: str = "as it was given",
) -> Extrapolation:
    """Measure a step of one device, and predict every mode on many with as large shares.

    Args:
        run: the training; pipelines are predicted if it is one, with its stages named.
        devices: that its batch is dealt to, of all pipelines together.
        scale: what is asked.
        facts: of the run's blocks, where they were measured already.
        step_s: seconds of a step of one device on its share, where that was measured elsewhere:
            all parts of a step here are brought to it.
        source: of `step_s`, for people.

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
        found += _data_parallel(work, network, scale.counts, gloo=scale.gloo)
        if isinstance(run.strategy, Pipeline):
            depth = devices // run.strategy.data_parallel
            found += _pipelines(work, network, scale.counts, facts, (depth, run.strategy))
    source = "measured here" if step_s is None else source
    return Extrapolation(share, work.seconds, source, scale.per_node, found)


def _data_parallel(
    work: Work, network: Network, counts: Sequence[int], *, gloo: bool
) -> Iterator[Speed]:
    sharded = partial(speeds.fsdp, gloo=gloo)
    for mode in (speeds.ddp, speeds.powersgd, sharded, speeds.parameter_server):
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


def scale_of(config: Scaled) -> Scale | None:
    """Return on what speeds are to be predicted, if anybody asked.

    Raises:
        ConfigError: a key that changes nothing without links, or means nothing.
    """
    if not config.links:
        fields = type(config).model_fields
        given = [key for key in fields if getattr(config, key) != fields[key].default]
        key = next((key for key in ("counts", "per_node", "step_s") if key in given), None)
        if key is not None:
            raise ConfigError(f"{key}: it changes nothing without links; add links=10gbit")
        return None
    scale = Scale(config.links, config.counts, config.per_node)
    scale.networks()
    for count in scale.counts:
        if count < 2:
            raise ConfigError(f"counts: {count}; take 2 devices or more")
    return scale
