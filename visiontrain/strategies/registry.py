"""STRATEGIES: every training mode by name."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.core.types import Place
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import StrategyConfig
from visiontrain.strategies.ddp import DDP
from visiontrain.strategies.fsdp import FSDP
from visiontrain.strategies.pipeline import Pipeline
from visiontrain.strategies.precision import Precision

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "single": lambda _, place, precision: Strategy(place, precision),
    "ddp": lambda _, place, precision: DDP(place, precision),
    "fsdp": lambda _, place, precision: FSDP(place, precision),
    "pipeline": lambda config, place, precision: Pipeline(
        place, precision, config.schedule, config.cuts
    ),
}


def build_strategy(config: StrategyConfig, place: Place, precision: str) -> Strategy:
    """Make the mode `config` names, for the process at `place`."""
    return STRATEGIES[config.kind](config, place, Precision(precision, place.device))
