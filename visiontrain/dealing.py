"""Which images of a run's data are read where, and which each simulated client has."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from visiontrain.data.partition import Dealing, Rows, deal, main_class, part
from visiontrain.data.table import Table
from visiontrain.recipe import Run
from visiontrain.strategies.config import Client
from visiontrain.strategies.federated.config import Federated


def served(run: Run) -> bool:
    """Tell whether a run serves clients on other machines, which have the images to train on."""
    return isinstance(run.strategy, Federated) and run.strategy.serve is not None


def splits_of(run: Run) -> tuple[str, ...]:
    """Return the splits that a training reads here."""
    return ("val",) if served(run) else ("train", "val")


def paced_of(run: Run, images: int) -> Run:
    """Return a run whose steps are those of the training loop: rounds, where clients train."""
    if not isinstance(run.strategy, Federated):
        return run
    return run.model_copy(update={"batch": images, "epochs": run.strategy.rounds})


def dealing_of(run: Run) -> Dealing:
    """Return how a run's images are dealt out to its clients."""
    config = run.strategy
    assert isinstance(config, Federated | Client)
    return Dealing(config.partition, config.clients, config.alpha, config.classes, run.seed)


def dealt(run: Run, train: Table, val: Table) -> tuple[Sequence[Rows], Sequence[Rows]]:
    """Return the rows of each client in both splits.

    Raises:
        ConfigError: a client would have nothing to train on.
    """
    return deal(dealing_of(run), train, val)


def own_part(run: Run, train: Table, val: Table) -> Table:
    """Return what one process trains on: all of `train`, or what one client has of it.

    Raises:
        ConfigError: a client would have nothing to train on.
    """
    if not isinstance(run.strategy, Client):
        return train
    number = run.strategy.number
    return part(train, dealt(run, train, val)[0][number], dealing_of(run), number)


def class_counts(table: Table, rows: Sequence[Rows]) -> list[list[int]]:
    """Count each client's images by the class that they have most boxes of, the last for none."""
    found, most = main_class(table), len(table.names) + 1
    return [np.bincount(found[own], minlength=most).tolist() for own in rows]


def line_of(rows: Sequence[Rows], kind: str) -> str:
    """Say how many images clients have."""
    sizes = sorted(len(own) for own in rows)
    among = f"{sizes[0]:,}" if sizes[0] == sizes[-1] else f"{sizes[0]:,} to {sizes[-1]:,}"
    return f"{len(rows)} clients of {among} images each ({kind})"
