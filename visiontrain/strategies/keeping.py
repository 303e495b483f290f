"""What clients keep when their run goes on (imports no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from visiontrain.core.errors import ConfigError
from visiontrain.core.section import Section
from visiontrain.strategies.config import Client, StrategyConfig
from visiontrain.strategies.federated.config import KEPT, Federated

KEEPING: Mapping[type[Section], Sequence[str]] = {  # modes whose clients keep their images
    Federated: KEPT,
    Client: ("number", "clients", "partition", "alpha", "classes"),
}


def check_same_clients(old: StrategyConfig, new: StrategyConfig) -> None:
    """Refuse to go on with clients, together or alone, that would have other images.

    Raises:
        ConfigError: naming the key.
    """
    kinds = {type(old), type(new)}
    if len(kinds) > 1 and kinds & KEEPING.keys():
        why = (
            "steps of one are rounds of the other" if Federated in kinds else "their images differ"
        )
        raise ConfigError(
            f"strategy: {new.kind}, but the run is {old.kind}; {why}, start anew with weights=FILE"
        )
    for key in KEEPING.get(type(old), ()):
        was, now = getattr(old, key), getattr(new, key)
        if was != now:
            raise ConfigError(
                f"strategy.{key}: {now}, but the run has {was}; what clients keep belongs to it, "
                "leave it out"
            )
