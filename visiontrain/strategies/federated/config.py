"""Settings of federated training (imports no torch)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.alone import Alone

ADAPTIVE = ("fedadam", "fedyogi", "fedadagrad")
ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "bulyan")
# What Reddi et al. 2021 found good on the whole; of the others the mean itself.
RATES = {"fedadam": 0.01, "fedyogi": 0.01, "fedadagrad": 0.01}
Partition = Literal["iid", "dirichlet", "classes", "quantity", "source", "feature"]
PARTS = Literal["backbone", "neck", "head", "norm"]


class Federated(Alone):
    """Federated on Flower: clients train on their own images, only weights travel."""

    kind: Literal["federated"] = "federated"
    clients: int = Field(4, ge=1, description="clients, each with images of its own")
    rounds: int | None = Field(
        None, ge=1, description="times that all meet; default: epochs / local_epochs"
    )
    local_epochs: int = Field(1, ge=1, description="passes over a client's images in a round")
    fraction: float = Field(1.0, gt=0, le=1, description="share of the clients that train a round")
    partition: Partition = Field(
        "iid", description="how the images of one data set are dealt out to clients"
    )
    alpha: float = Field(
        0.5, gt=0, description="for dirichlet and quantity: the lower, the more unequal"
    )
    classes: int = Field(2, ge=1, description="for partition=classes: classes that a client has")
    algorithm: Literal[
        "fedavg",
        "fedavgm",
        "fedprox",
        "fedadam",
        "fedyogi",
        "fedadagrad",
        "scaffold",
        "fednova",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "bulyan",
    ] = Field("fedavg", description="what the server makes of the clients' weights")
    prox: float = Field(
        0.01, gt=0, description="for fedprox: pull of a client's weights towards the server's"
    )
    server_lr: float | None = Field(
        None, gt=0, description="the server's rate; default: 1, for fedadam and the like 0.01"
    )
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="for fedavgm, fedadam and the like: how long ways are kept"
    )
    server_beta2: float = Field(
        0.99, ge=0, lt=1, description="for fedadam, fedyogi: how long their squares are kept"
    )
    tau: float = Field(1e-3, gt=0, description="for fedadam and the like: what squares begin with")
    faulty: int = Field(
        1, ge=1, description="clients that may send anything: for trimmed_mean, krums and bulyan"
    )
    chosen: int | None = Field(
        None, ge=1, description="for multi_krum: clients that are averaged; default: all but faulty"
    )
    local: list[PARTS] = Field(
        [], description="parts that each client keeps for itself; norm: FedBN"
    )
    clip: float | None = Field(
        10.0, gt=0, description="longest update, in medians of the round's; null: any length"
    )
    min_fit: int | None = Field(
        None, ge=1, description="results that end a round; default: all that were asked"
    )
    timeout_s: float = Field(3600.0, gt=0, description="seconds until a round goes on without them")
    score_every: int | None = Field(
        None, ge=1, description="rounds between scores by clients; default: at the end alone"
    )
    processes: int | None = Field(
        None, ge=1, description="clients that train at once on this machine; default: its cores"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per client; default: cores / clients at once"
    )
    serve: str | None = Field(
        None, description="HOST:PORT to wait at for clients on other machines, which have the data"
    )
    keys: str = Field("keys", description="with serve: folder of certificates and clients' keys")

    @property
    def server_rate(self) -> float:
        """Return the server's learning rate."""
        return self.server_lr or RATES.get(self.algorithm, 1.0)


# What says how images are dealt out, or trained on here: of no use where clients have their own.
HERE = ("partition", "alpha", "classes", "processes", "threads")
# Key, the one it belongs to, and the values of that under which it does something.
DEALT = (
    ("alpha", "partition", ("dirichlet", "quantity")),
    ("classes", "partition", ("classes",)),
)
NEEDS = (
    *DEALT,
    ("prox", "algorithm", ("fedprox",)),
    ("server_momentum", "algorithm", ("fedavgm", *ADAPTIVE)),
    ("server_beta2", "algorithm", ("fedadam", "fedyogi")),
    ("tau", "algorithm", ADAPTIVE),
    ("faulty", "algorithm", ("trimmed_mean", "krum", "multi_krum", "bulyan")),
    ("chosen", "algorithm", ("multi_krum",)),
)


def takers(config: Federated) -> int:
    """Return how many clients train in a round."""
    return max(1, round(config.fraction * config.clients))


def check_federated(config: Federated, epochs: int) -> None:
    """Refuse keys that change nothing, do not go together, or need more clients.

    Args:
        config: of the mode.
        epochs: key of the run.

    Raises:
        ConfigError: naming the key.
    """
    for key, other, values in NEEDS:
        value = getattr(config, key)
        if value != type(config).model_fields[key].default and getattr(config, other) not in values:
            raise ConfigError(
                f"strategy.{key}: {value}; it changes nothing here, add "
                f"strategy.{other}={values[0]} or leave it out"
            )
    check_served(config)
    if config.server_lr is not None and config.algorithm in (*ROBUST, "fednova"):
        raise ConfigError(
            f"strategy.server_lr: {config.server_lr:g} with strategy.algorithm={config.algorithm}, "
            "which has none; leave it out"
        )
    if config.rounds is None and epochs % config.local_epochs:
        raise ConfigError(
            f"strategy.local_epochs: {config.local_epochs} of {epochs} epochs; take a divisor, or "
            "strategy.rounds"
        )
    asked, most = takers(config), config.min_fit
    if config.fraction < 1 and asked == config.clients > 1:
        raise ConfigError(
            f"strategy.fraction: {config.fraction:g} of {config.clients} clients are all of them; "
            f"take {1 - 1 / config.clients:.3g} or less, or leave it out"
        )
    if most is not None and most > asked:
        raise ConfigError(f"strategy.min_fit: {most}; {asked} clients are asked in a round")
    least = least_updates(config)
    if (most or asked) < least:
        raise ConfigError(
            f"strategy.algorithm: {config.algorithm} of {most or asked} clients, "
            f"{config.faulty} of them faulty; it takes {least} or more"
        )
    if config.chosen is not None and config.chosen > asked - config.faulty:
        raise ConfigError(
            f"strategy.chosen: {config.chosen} of {asked} clients, {config.faulty} of them faulty; "
            f"take {asked - config.faulty} or fewer"
        )


def check_served(config: Federated) -> None:
    """Refuse keys that do nothing with or without clients on other machines.

    Raises:
        ConfigError: naming the key.
    """
    fields = type(config).model_fields
    if config.serve is None:
        if config.keys != fields["keys"].default:
            raise ConfigError(
                f"strategy.keys: {config.keys}; it changes nothing here, add "
                "strategy.serve=HOST:PORT or leave it out"
            )
        return
    host, _, port = config.serve.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"strategy.serve: {config.serve!r}; write HOST:PORT, as 0.0.0.0:9092")
    if host not in ("0.0.0.0", "127.0.0.1", "localhost"):  # noqa: S104 - the server's own programs
        raise ConfigError(
            f"strategy.serve: {config.serve!r}; Flower's programs here have to reach it, too: take "
            "0.0.0.0 or 127.0.0.1, and let a firewall choose networks"
        )
    for key in HERE:
        if getattr(config, key) != fields[key].default:
            raise ConfigError(
                f"strategy.{key}: {getattr(config, key)} with strategy.serve, whose clients have "
                "images and machines of their own; leave it out"
            )


def least_krum(faulty: int) -> int:
    """Return among how many Krum chooses: as many neighbours count as may be wrong.

    With fewer, wrong ones that are alike are each other's neighbours, and are chosen. Blanchard et
    al. 2017 prove more, for one more.
    """
    return 2 * faulty + 2


def least_updates(config: Federated) -> int:
    """Return how many updates the rule needs, some of them faulty."""
    return {
        "trimmed_mean": 2 * config.faulty + 1,
        "median": 3,
        "krum": least_krum(config.faulty),
        "multi_krum": least_krum(config.faulty),
        "bulyan": 4 * config.faulty + 3,
    }.get(config.algorithm, 1)


# What a run that goes on cannot change: what clients keep belongs to their images.
KEPT = ("clients", "partition", "alpha", "classes", "local", "local_epochs")


def in_rounds(
    config: Federated, epochs: int, *, given: bool, rounds_given: bool
) -> tuple[Federated, int]:
    """Return the mode with its number of rounds, and the epochs that they are.

    Args:
        config: of the mode.
        epochs: key of the run.
        given: whether somebody set that now.
        rounds_given: whether somebody set the rounds now.

    Raises:
        ConfigError: both say how long to train, and not the same.
    """
    if config.rounds is None or (given and not rounds_given):
        if epochs % config.local_epochs:
            raise ConfigError(
                f"strategy.local_epochs: {config.local_epochs} of {epochs} epochs; take a divisor, "
                "or strategy.rounds"
            )
        return config.model_copy(update={"rounds": epochs // config.local_epochs}), epochs
    whole = config.rounds * config.local_epochs
    if given and epochs != whole:
        raise ConfigError(
            f"epochs: {epochs}, but strategy.rounds={config.rounds} of {config.local_epochs} are "
            f"{whole}; leave one of them out"
        )
    return config, whole
