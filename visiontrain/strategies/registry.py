"""STRATEGIES: every training mode by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.types import Place
from visiontrain.strategies import config as settings
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import StrategyConfig
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.federated.flower_environment import set_flower_environment
from visiontrain.strategies.installed import check_installed
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.ray_environment import set_environment
from visiontrain.strategies.remote import Remote


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


def parameter_server(
    config: settings.ParameterServer, place: Place, precision: Precision, remote: Remote
) -> Strategy:
    """Make the driver's side of parameter servers."""
    from visiontrain.strategies.parameter_server.driver import Driver  # noqa: PLC0415

    check_installed(config)
    set_environment(config.kind, config.address, config.tls)  # read when Ray is imported
    from visiontrain.strategies.parameter_server.ray_engine import RayEngine  # noqa: PLC0415

    return Driver(place, precision, config, RayEngine(config, place.device, remote), remote)


def federated(config: Federated, place: Place, precision: Precision, remote: Remote) -> Strategy:
    """Make the server's side of federated training: clients are simulated here, or elsewhere."""
    from visiontrain.strategies.federated.server import Server  # noqa: PLC0415

    check_installed(config)
    set_flower_environment()
    if config.serve is not None:
        from visiontrain.strategies.federated.deployment import Deployment  # noqa: PLC0415

        assert remote.scratch is not None
        engine = Deployment(config, remote.scratch.parent)
        return Server(place, precision, config, engine, remote)
    set_environment(config.kind)
    from visiontrain.strategies.federated.simulation import Simulation  # noqa: PLC0415

    return Server(place, precision, config, Simulation(config, place.device, remote), remote)


def alone(config: StrategyConfig, place: Place, precision: Precision) -> Strategy:
    """Make what one process does, also where it will only score."""
    del config
    return Strategy(place, precision)


STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "single": alone,
    "ddp": ddp,
    "fsdp": fsdp,
    "pipeline": pipeline,
    "placement": placement,
    "parameter_server": alone,
    "federated": alone,
    "client": alone,
}
# Of those, what trains in processes that it starts itself.
DRIVERS: dict[str, Callable[..., Strategy]] = {
    "parameter_server": parameter_server,
    "federated": federated,
}


def build_strategy(
    config: StrategyConfig, place: Place, precision: str, remote: Remote | None = None
) -> Strategy:
    """Make the mode `config` names, for the process at `place`.

    Args:
        config: of the mode.
        place: of this process.
        precision: a key of the run.
        remote: what processes are told that the mode starts itself; None where nothing trains.
    """
    made = Precision(precision, place.device)
    if remote is not None and config.kind in DRIVERS:
        return DRIVERS[config.kind](config, place, made, remote)
    return STRATEGIES[config.kind](config, place, made)
