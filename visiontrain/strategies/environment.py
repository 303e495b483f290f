"""What launchers tell a process: which of how many it is, and where all of them meet."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from visiontrain.core.errors import ConfigError

LOOPBACK = "127.0.0.1"
PORT = 29500  # torchrun's own default
FIRST_PORT, PORTS = 10_000, 20_000  # below those that systems hand out by themselves

Environment = Mapping[str, str]
RESTARTED: list[str] = []  # why this program started the processes of runs again


@dataclass(frozen=True, slots=True)
class Launched:
    """One of the processes that a launcher started."""

    by: str  # the launcher, for messages
    rank: int
    world: int  # processes over all machines
    address: str  # of the store that they meet in
    port: int
    local_rank: int | None = None  # among those on this machine; None: nobody told
    local_world: int | None = None  # processes on this machine; None: nobody told
    has_agent: bool = False  # torchrun's agent holds the store, not rank 0
    scratch: Path | None = None  # torchrun's folder on this machine, which outlives its processes

    @property
    def is_alone(self) -> bool:
        """Tell whether all processes are on this machine."""
        return self.local_world == self.world


def launched(environment: Environment | None = None) -> Launched | None:
    """Return what a launcher told this process; None where none started it.

    torchrun and those that speak its variables, Open MPI's mpirun and Slurm's srun are known.
    A shell or a batch script inside a Slurm job is no launched process, nor is a single task.

    Args:
        environment: variables by name; default: those of this process.

    Raises:
        ConfigError: a variable is missing or no number.
    """
    env = os.environ if environment is None else environment
    if {"RANK", "WORLD_SIZE"} <= env.keys():
        return _by_torchrun(env)
    # mpirun starts its own daemons by srun, so that its processes carry both.
    if _number(env, "OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _by_mpirun(env)
    if _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PTY_PORT" not in env:
        return _by_srun(env)
    return None


def is_first() -> bool:
    """Tell whether this process prepares the run: all do but those that rank 0 tells."""
    found = launched()
    return found is None or found.rank == 0


def wants_torchrun(environment: Environment | None = None) -> bool:
    """Tell whether torchrun is still to be started, with the settings that Kubernetes left.

    Kubeflow sets `PET_*`, torchrun's own defaults, in every pod and leaves torchrun to the
    command. RANK may be set beside them; it is the process's own where a pod runs only one.
    """
    env = os.environ if environment is None else environment
    if "TORCHELASTIC_RUN_ID" in env:
        return False
    nodes, here = env.get("PET_NNODES", "1"), env.get("PET_NPROC_PER_NODE", "1")
    return here != "1" or (nodes != "1" and "RANK" not in env)


def cpu_threads(here: int) -> int | None:
    """Return how many CPU threads this process gets; None where OMP_NUM_THREADS says it.

    A launcher may have bound the process to some cores, or leave all of them to everybody.

    Args:
        here: processes on this machine.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    whole = _number(os.environ, "SLURM_CPUS_ON_NODE", os.cpu_count() or 1)
    return max(1, min(cores(), _number(os.environ, "SLURM_CPUS_PER_TASK", whole // here)))


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def bound(here: int) -> bool:
    """Tell whether a launcher bound this process to its share of the cores, one of `here`."""
    told = launched()
    if told is None or told.by not in ("srun", "mpirun") or here == 1:
        return False
    return cores() <= _number(os.environ, "SLURM_CPUS_ON_NODE", os.cpu_count() or 1) // here


def talk_through(interface: str, *, only: bool) -> None:
    """Let gloo use this network interface, and NCCL with `only`, unless the user named one.

    Left alone, NCCL uses all interfaces at once that lead to other machines.
    """
    for library in ("GLOO", "NCCL") if only else ("GLOO",):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)


# -- launchers ------------------------------------------------------------------------


def _by_torchrun(env: Environment) -> Launched:
    world = _number(env, "WORLD_SIZE")
    told = {"local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE"}
    local = {key: _number(env, name) for key, name in told.items() if name in env}
    if world == 1:
        local = {"local_rank": 0, "local_world": 1}
    elif "MASTER_ADDR" not in env:
        raise ConfigError(f"MASTER_ADDR: not set, but WORLD_SIZE is {world}; set rank 0's host")
    host, errors = env.get("MASTER_ADDR", LOOPBACK), env.get("TORCHELASTIC_ERROR_FILE")
    return Launched(
        by="torchrun",
        rank=_number(env, "RANK"),
        world=world,
        address=LOOPBACK if host == "localhost" or local.get("local_world") == world else host,
        port=_number(env, "MASTER_PORT", PORT),
        has_agent=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        scratch=Path(errors).parents[2] if errors else None,  # /attempt/local rank/error.json
        **local,
    )


def _by_mpirun(env: Environment) -> Launched:
    world, here = _number(env, "OMPI_COMM_WORLD_SIZE"), _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    if world != here and "MASTER_ADDR" not in env:
        raise ConfigError("MASTER_ADDR: not set; add -x MASTER_ADDR=HOST to mpirun, rank 0's host")
    job = env.get("PMIX_NAMESPACE", "")  # the same in all processes, another in each mpirun
    return Launched(
        by="mpirun",
        rank=_number(env, "OMPI_COMM_WORLD_RANK"),
        world=world,
        address=LOOPBACK if world == here else env["MASTER_ADDR"],
        port=_number(env, "MASTER_PORT", FIRST_PORT + crc32(job.encode()) % PORTS),
        local_rank=_number(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world=here,
    )


def _by_srun(env: Environment) -> Launched:
    world, node = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_NODEID")
    here = tasks_per_node(env["SLURM_STEP_TASKS_PER_NODE"])[node]
    # Steps of one job may share a machine, and so may jobs.
    seed = 16 * _number(env, "SLURM_JOB_ID") + _number(env, "SLURM_STEP_ID")
    host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
    return Launched(
        by="srun",
        rank=_number(env, "SLURM_PROCID"),
        world=world,
        address=LOOPBACK if world == here else host,
        port=_number(env, "MASTER_PORT", FIRST_PORT + seed % PORTS),
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world=here,
    )


def tasks_per_node(text: str) -> list[int]:
    """Read how many tasks Slurm starts on each node: `4(x2),3` is 4, 4, 3."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(text: str) -> str:
    """Return the first of Slurm's hosts: of `gpu[01-03,07],login1` it is `gpu01`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", text)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match.group() if match else text)


def _number(env: Environment, name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        got = "not set" if text is None else repr(text)
        raise ConfigError(f"{name}: {got}; whoever starts the processes sets a whole number")
    return int(text)
