"""Settings of the training modes (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.core.errors import ConfigError
from visiontrain.strategies.alone import Alone
from visiontrain.strategies.federated.config import DEALT, Federated, Partition, least_krum


class Single(Alone):
    """One process, one device: the control run for every other mode."""

    kind: Literal["single"] = "single"


class Placement(Alone):
    """One process, blocks on several devices that take turns: a pipeline's baseline."""

    kind: Literal["placement"] = "placement"
    stages: Literal["auto"] | list[str] = Field(
        "auto",
        description="first block on each device but the first; auto: equal numbers of operations",
    )


class Client(Alone):
    """One client of a federated run, alone on its own images: a reference for the others."""

    kind: Literal["client"] = "client"
    number: int = Field(0, ge=0, description="for client: which one it is, from 0")
    clients: int = Field(4, ge=1, description="clients, each with images of its own")
    partition: Partition = Field(
        "iid", description="how the images of one data set are dealt out to clients"
    )
    alpha: float = Field(
        0.5, gt=0, description="for dirichlet and quantity: the lower, the more unequal"
    )
    classes: int = Field(2, ge=1, description="for partition=classes: classes that a client has")


class ParameterServer(Alone):
    """Parameter server on Ray: workers make gradients, servers apply them."""

    kind: Literal["parameter_server"] = "parameter_server"
    processes: int = Field(2, ge=1, description="workers, each of which makes gradients")
    servers: int = Field(1, ge=1, description="servers, each of which holds a part of the weights")
    sync: Literal["bsp", "asp", "ssp", "backup", "easgd"] = Field(
        "bsp", description="bsp: an update is a step's sum; asp, ssp: each gradient is one"
    )
    staleness: int = Field(
        2, ge=0, description="for ssp: how many gradients a worker may be ahead of the slowest"
    )
    stale_lr: bool = Field(
        False, description="for asp and ssp: the older a gradient's weights, the lower its rate"
    )
    spare: int = Field(1, ge=1, description="for backup: workers that an update does not wait for")
    meet_every: int = Field(
        4, ge=1, description="for easgd: gradients of a worker between its meetings with the center"
    )
    elasticity: float = Field(
        0.9, gt=0, lt=1, description="for easgd: how far the center goes to the workers' mean"
    )
    aggregate: Literal["mean", "median", "trimmed_mean", "krum"] = Field(
        "mean", description="for bsp and backup: rule that makes one gradient of all"
    )
    faulty: int = Field(
        1, ge=1, description="workers whose gradients may be wrong: for trimmed_mean and krum"
    )
    compress: Literal["none", "fp16", "bf16", "powersgd", "topk"] = Field(
        "none", description="how gradients travel; powersgd and topk remember what they left out"
    )
    powersgd_rank: int = Field(2, ge=1, description="rank of powersgd's matrices")
    topk: float = Field(0.01, gt=0, le=1, description="share of each matrix that topk sends")
    snapshot_every: int = Field(
        100, ge=1, description="updates between a server's snapshots, to which it may go back"
    )
    address: str | None = Field(
        None, description="HOST:PORT of a Ray cluster to join; by default one starts here"
    )
    tls: str | None = Field(
        None, description="folder of ca.crt, tls.crt and tls.key that all its processes have"
    )
    timeout_s: float = Field(
        600.0, gt=0, description="seconds at one gradient until a worker is replaced"
    )
    max_restarts: int = Field(
        3, ge=0, description="how many workers and servers that ended are replaced"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per worker; default: cores / workers"
    )


class Group(Section):
    """What all modes of several processes share."""

    processes: int = Field(
        2, ge=1, description="processes on this machine; where it is not set, one for every GPU"
    )
    timeout_s: float = Field(
        600.0, gt=0, description="seconds until a process that the others wait for is named"
    )
    max_restarts: int = Field(
        3, ge=0, description="how often all start again when one was killed, crashed or hung"
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per process; default: cores / processes"
    )


class DDP(Group):
    """Data parallel: every process holds the model and a share of each batch."""

    kind: Literal["ddp"] = "ddp"
    aggregate: Literal["mean", "median", "trimmed_mean", "krum"] = Field(
        "mean", description="rule that makes one gradient of all; all but mean stand wrong ones"
    )
    faulty: int = Field(
        1, ge=1, description="processes whose gradients may be wrong: for trimmed_mean and krum"
    )
    compress: Literal["none", "fp16", "bf16", "powersgd", "topk"] = Field(
        "none", description="how gradients travel; powersgd and topk remember what they left out"
    )
    powersgd_rank: int = Field(2, ge=1, description="rank of powersgd's matrices")
    topk: float = Field(0.01, gt=0, le=1, description="share of each matrix that topk sends")
    compress_after: float = Field(
        0.05, ge=0, lt=1, description="share of the run whose gradients travel whole first"
    )
    topology: Literal["flat", "hierarchical"] = Field(
        "flat", description="hierarchical: sum inside machines first, then between them"
    )
    inner: int | None = Field(
        None, ge=1, description="processes summed first; default: those of a machine"
    )
    sync_every: int = Field(
        1, ge=1, description="steps between meetings; above 1 processes train on their own"
    )
    outer: Literal["average", "diloco"] = Field(
        "average", description="how weights meet: their mean, or a step with momentum towards it"
    )
    outer_lr: float = Field(0.7, gt=0, description="diloco's learning rate")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="diloco's momentum")


class FSDP(Group):
    """Sharded data parallel: parameters, gradients, optimizer and EMA are cut over processes."""

    kind: Literal["fsdp"] = "fsdp"
    reduce: Literal["full", "bf16"] = Field(
        "full", description="format that gradients are summed in: full is that of the weights, fp32"
    )
    offload: bool = Field(
        False,
        description="keep parameters, gradients and optimizer in the CPU's memory (GPUs only)",
    )


class Pipeline(Group):
    """Model parallel: every process holds a run of blocks; micro-batches flow through."""

    kind: Literal["pipeline"] = "pipeline"
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv"] = Field(
        "gpipe", description="order of the micro-batches; the last three give processes two stages"
    )
    stages: Literal["auto"] | list[str] = Field(
        "auto", description="first block of each stage but the first; auto: measured and balanced"
    )
    memory: float | None = Field(
        None, gt=0, description="GiB that a process's tensors may take at most, the loss's aside"
    )
    data_parallel: int = Field(
        1, ge=1, description="pipelines side by side, each on its share of a batch"
    )
    sharded: bool = Field(
        False, description="cut each stage's weights, optimizer and average over them, as fsdp does"
    )


StrategyConfig = Annotated[
    Single | DDP | FSDP | Pipeline | Placement | ParameterServer | Federated | Client,
    Field(discriminator="kind"),
]

Needs = tuple[tuple[str, str, tuple[str, ...]], ...]
Excludes = tuple[tuple[str, tuple[str, ...], str, tuple[str | int, ...]], ...]

HALVING = ("zero_bubble", "zbv")  # the backward pass: what inputs get, and what weights get
HALF, SPARSE = ("fp16", "bf16"), ("powersgd", "topk")
# Keys of DDP that are used only beside others: key, other key, its values.
NEEDS = (
    ("faulty", "aggregate", ("trimmed_mean", "krum")),
    ("powersgd_rank", "compress", ("powersgd",)),
    ("topk", "compress", ("topk",)),
    ("compress_after", "compress", SPARSE),
    ("inner", "topology", ("hierarchical",)),
    ("outer_lr", "outer", ("diloco",)),
    ("outer_momentum", "outer", ("diloco",)),
)
# Values that do not go with others: key, values, other key, the values it must have.
EXCLUDES = (
    ("aggregate", ("median", "trimmed_mean", "krum"), "compress", ("none", *HALF)),
    ("aggregate", ("median", "trimmed_mean", "krum"), "topology", ("flat",)),
    ("compress", ("topk",), "topology", ("flat",)),
    ("aggregate", ("median", "trimmed_mean", "krum"), "sync_every", (1,)),
    ("compress", (*HALF, *SPARSE), "sync_every", (1,)),
    ("topology", ("hierarchical",), "sync_every", (1,)),
)


# As NEEDS and EXCLUDES, for parameter servers.
SERVER_NEEDS = (
    ("staleness", "sync", ("ssp",)),
    ("stale_lr", "sync", ("asp", "ssp")),
    ("spare", "sync", ("backup",)),
    ("meet_every", "sync", ("easgd",)),
    ("elasticity", "sync", ("easgd",)),
    ("faulty", "aggregate", ("trimmed_mean", "krum")),
    ("powersgd_rank", "compress", ("powersgd",)),
    ("topk", "compress", ("topk",)),
)
SERVER_EXCLUDES = (
    ("aggregate", ("median", "trimmed_mean", "krum"), "sync", ("bsp", "backup")),
    ("aggregate", ("krum",), "servers", (1,)),
    ("aggregate", ("median", "trimmed_mean", "krum"), "compress", ("none", *HALF)),
    ("compress", (*HALF, *SPARSE), "sync", ("bsp", "asp", "ssp", "backup")),
)


def check_data_parallel(config: DDP) -> None:
    """Refuse keys that change nothing, or do not go together.

    Raises:
        ConfigError: naming the key.
    """
    _check_pairs(config, NEEDS, EXCLUDES)
    if config.outer != "average" and config.sync_every == 1:
        raise ConfigError(
            f"strategy.outer: {config.outer}; weights only meet with strategy.sync_every=2 or more"
        )


def check_client(config: Client) -> None:
    """Refuse a client that there is not, and keys that change nothing.

    Raises:
        ConfigError: naming the key.
    """
    _check_pairs(config, DEALT, ())
    if config.number >= config.clients:
        raise ConfigError(
            f"strategy.number: {config.number} of {config.clients} clients; the first is 0"
        )


def check_servers(config: ParameterServer, images: int, precision: str) -> None:
    """Refuse keys that change nothing, do not go together, or need more workers.

    Args:
        config: of the mode.
        images: in a whole step.
        precision: key of the run.

    Raises:
        ConfigError: naming the key.
    """
    _check_pairs(config, SERVER_NEEDS, SERVER_EXCLUDES)
    shares = config.processes - (config.spare if config.sync == "backup" else 0)
    if shares < 1:
        raise ConfigError(
            f"strategy.spare: {config.spare} of {config.processes} workers; some have to be left, "
            "take fewer or a larger strategy.processes"
        )
    if precision == "fp16":
        raise ConfigError(
            "precision: fp16 with strategy=parameter_server, whose workers have no common loss "
            "scale; take bf16"
        )
    least = least_ranks(config.aggregate, config.faulty)
    if config.aggregate != "mean" and shares < least:
        raise ConfigError(
            f"strategy.aggregate: {config.aggregate} of {shares} gradients; it takes {least} "
            "workers or more"
        )
    if config.aggregate != "mean" and 0 < images < shares:
        raise ConfigError(
            f"batch: {images} for {shares} workers; under strategy.aggregate={config.aggregate} "
            "each needs an image of its own, take a larger batch"
        )


def _check_pairs(config: Section, needs: Needs, excludes: Excludes) -> None:
    for key, other, values in needs:
        value, beside = getattr(config, key), getattr(config, other)
        if value != type(config).model_fields[key].default and beside not in values:
            raise ConfigError(
                f"strategy.{key}: {value}; it changes nothing here, add "
                f"strategy.{other}={values[0]} or leave it out"
            )
    for key, values, other, needed in excludes:
        value, beside = getattr(config, key), getattr(config, other)
        if value in values and beside not in needed:
            raise ConfigError(
                f"strategy.{key}: {value} with strategy.{other}={beside}; take "
                f"strategy.{other}={needed[0]}"
            )


def least_ranks(name: str, faulty: int) -> int:
    """Return how many ranks a rule needs, `faulty` of them wrong."""
    return least_krum(faulty) if name == "krum" else 2 * faulty + 1


def check_votes(config: DDP, world: int, images: int) -> None:
    """Refuse a rule among too few ranks, or ranks that would vote without an image.

    Args:
        config: of the mode.
        world: ranks on all machines.
        images: in the smallest micro-batch of a whole step.

    Raises:
        ConfigError: naming the key.
    """
    name, least = config.aggregate, least_ranks(config.aggregate, config.faulty)
    if name == "mean":
        return
    if world < least:
        among = "" if name == "median" else f" while strategy.faulty={config.faulty}"
        raise ConfigError(
            f"strategy.aggregate: {name} on {world}; it takes {least} processes or more{among}"
        )
    if images < world:
        raise ConfigError(
            f"batch: {images} in a micro-batch for {world} processes; under strategy.aggregate="
            f"{name} each needs an image of its own, take a larger batch or a smaller accumulate"
        )


def check_pipeline(config: Pipeline, processes: int, accumulate: int) -> None:
    """Refuse pipelines side by side that have no equal shares, and counts a schedule cannot have.

    Raises:
        ConfigError: naming the key.
    """
    copies = config.data_parallel
    if processes % copies or processes == copies > 1:
        raise ConfigError(
            f"strategy.data_parallel: {copies} with {processes} processes, which have to be a "
            f"multiple of it, {2 * copies} or more"
        )
    if config.sharded and copies == 1:
        raise ConfigError(
            "strategy.sharded: true with one pipeline, which has nobody to share with; add "
            "strategy.data_parallel=2 or leave it out"
        )
    depth = processes // copies
    count = max(accumulate, depth)
    rounds = max(1, count // depth)
    if config.schedule in ("interleaved_1f1b", "zero_bubble") and count % rounds:
        raise ConfigError(
            f"accumulate: {accumulate} with strategy.schedule={config.schedule}, which takes "
            f"micro-batches in {rounds} equal rounds; take a multiple of {depth}"
        )


def check_ranks(config: DDP, world: int, *, fixed: bool = True) -> None:
    """Refuse what takes other processes, or groups of them, than there are.

    Args:
        config: of the mode.
        world: ranks on all machines.
        fixed: whether there will be as many to the end; else one may be alone for a while.

    Raises:
        ConfigError: naming the key.
    """
    inner = config.inner or config.processes
    if config.topology == "hierarchical" and (inner in (1, world) or world % inner):
        raise ConfigError(
            f"strategy.topology: hierarchical with {world} processes in groups of {inner}; set "
            "strategy.inner to a divisor, or take flat"
        )
    for key in ("compress", "sync_every"):
        value = getattr(config, key)
        if fixed and world == 1 and value != DDP.model_fields[key].default:
            raise ConfigError(
                f"strategy.{key}: {value} in one process, which nobody talks to; take "
                "strategy.processes=2 or leave it out"
            )
