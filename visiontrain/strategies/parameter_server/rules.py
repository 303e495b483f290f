"""What the keys of the mode mean for servers and workers."""

from __future__ import annotations

from collections.abc import Sequence

from visiontrain.strategies.config import HALF, SPARSE, ParameterServer
from visiontrain.strategies.parameter_server.encoding import ENCODINGS
from visiontrain.strategies.parameter_server.shard import Rules
from visiontrain.strategies.parameter_server.talk import Terms

ALONE = ("asp", "ssp")  # each gradient is an update


def shares_of(config: ParameterServer) -> int:
    """Return into how many shares a step's batch is cut."""
    return config.processes - (config.spare if config.sync == "backup" else 0)


def rules_of(config: ParameterServer, optimizer: str) -> Rules:
    """Return how servers make updates.

    A gradient that is an update by itself, of a share of 1 / W of a step, has 1 / W of SGD's rate.
    Steps of other optimizers do not shrink with their gradients: of a W-th of the images the rate
    is 1 / sqrt(W) (Malladi et al. 2022, arXiv 2205.10287).

    With `stale_lr` the rate of a gradient is divided by its staleness (Zhang et al. 2016,
    arXiv 1511.05950) in units of W - 1, which is what W equally fast workers have, and for which
    the rate above is right; for two workers that is the staleness itself.

    Args:
        config: of the mode.
        optimizer: `optim.kind`.
    """
    workers, elastic = config.processes, config.sync == "easgd"
    alone = config.sync in ALONE
    return Rules(
        encoding=ENCODINGS[config.compress](config),
        aggregate=config.aggregate,
        faulty=config.faulty,
        rate=workers ** (-1.0 if optimizer == "sgd" else -0.5) if alone else 1.0,
        share=1 / workers if alone else 1.0,
        ages=max(1, workers - 1) if config.stale_lr else 0,
        elastic=elastic,
        own_units=own_units(config),
        batch_share=config.meet_every / workers if elastic else 1 / workers if alone else 1.0,
    )


def terms_of(config: ParameterServer, parts: Sequence[Sequence[str]]) -> Terms:
    """Return what a worker has to know."""
    encoding = ENCODINGS[config.compress](config)
    return Terms(parts, encoding, own_units(config), holds=config.sync == "ssp")


def own_units(config: ParameterServer) -> bool:
    """Tell whether gradients go divided by their own counts: for rules, and for 16 bits."""
    return config.aggregate != "mean" or config.compress in (*HALF, *SPARSE)
