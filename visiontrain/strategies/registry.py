"""STRATEGIES: every training mode by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.types import Place
from visiontrain.strategies import config as settings
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import StrategyConfig
from visiontrain.strategies.precision import Precision


def ddp(config: settings.DDP, place: Place, precision: Precision) -> Strategy:
    """Make data parallelism: gradients meet at every step, or weights now and then."""
    if config.sync_every > 1:
        from visiontrain.strategies.local_sgd import LocalSGD  # noqa: PLC0415

        return LocalSGD(place, precision, config)
    from visiontrain.strategies.ddp import DDP  # noqa: PLC0415

    return DDP(place, precision, config)


def fsdp(config: settings.FSDP, place: Place, precision: Precision) -> Strategy:
    """Make fully sharded data parallelism."""
    from visiontrain.strategies.fsdp import FSDP  # noqa: PLC0415 - torch's takes a second

    return FSDP(place, precision, reduce=config.reduce, offload=config.offload)


def pipeline(config: settings.Pipeline, place: Place, precision: Precision) -> Strategy:
    """Make pipeline model parallelism, perhaps with shards over pipelines side by side."""
    if config.sharded:
        from visiontrain.strategies.sharded_pipeline import ShardedPipeline  # noqa: PLC0415

        return ShardedPipeline(place, precision, config)
    from visiontrain.strategies.pipeline import Pipeline  # noqa: PLC0415 - torch's takes a second

    return Pipeline(place, precision, config)


def placement(config: settings.Placement, place: Place, precision: Precision) -> Strategy:
    """Make naive placement on the devices of this process."""
    from visiontrain.strategies.placement import Placement  # noqa: PLC0415

    return Placement(place, precision, config.stages)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "single": lambda _, place, precision: Strategy(place, precision),
    "ddp": ddp,
    "fsdp": fsdp,
    "pipeline": pipeline,
    "placement": placement,
}


def build_strategy(config: StrategyConfig, place: Place, precision: str) -> Strategy:
    """Make the mode `config` names, for the process at `place`."""
    return STRATEGIES[config.kind](config, place, Precision(precision, place.device))
