"""Which devices `device=` names, and whether a mode can use them."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from socket import gethostname
from typing import TypeVar

import torch

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.config import (
    FSDP,
    Alone,
    Client,
    Group,
    ParameterServer,
    Placement,
    Single,
    StrategyConfig,
)
from visiontrain.strategies.environment import Launched, cores, launched
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.meeting import located

G = TypeVar("G", bound=Group)


def devices(text: str) -> list[torch.device]:
    """List the devices that `device=` names: auto, cpu, cuda, cuda:1, or numbers as 0,1 or cpu,0.

    Raises:
        ConfigError: there is no such device.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not found):
        return [torch.device("cpu")]
    numbers = text.removeprefix("cuda").removeprefix(":")
    wanted = range(found) if text == "auto" or not numbers else numbers.split(",")
    named = [str(number).strip() for number in wanted]
    if not all(name.isdecimal() or (name == "cpu" and "cuda" not in text) for name in named):
        raise ConfigError(f"device: {text!r}; take auto, cpu, cuda, or GPU numbers such as 0,1")
    if not named or any(int(name) >= found for name in named if name != "cpu"):
        take = "device=cpu" if len(named) < 2 else "device=cpu (strategy=placement: cpu,cpu)"
        raise ConfigError(f"device: {text!r}; torch sees {found} GPUs here, take {take}")
    return [torch.device(name if name == "cpu" else f"cuda:{name}") for name in named]


def threads(config: Group | ParameterServer) -> int:
    """Return how many CPU threads one process gets."""
    return config.threads or max(1, cores() // config.processes)


def settle(config: StrategyConfig, device: str) -> StrategyConfig:
    """Return the mode as it will run here: a launcher says how many processes there are.

    Raises:
        ConfigError: when it cannot run on these devices, or not under that launcher.
    """
    found = devices(device)
    told = launched()
    if isinstance(config, Alone):
        if told is not None and told.world != 1:
            raise ConfigError(
                f"strategy: {config.kind} under {told.by}; start one process, or take strategy=ddp"
            )
        if isinstance(config, ParameterServer | Federated):
            _refuse_mixed(config, device, found)
        if isinstance(config, ParameterServer):
            return _settle_workers(config, found)
        if "," in device and isinstance(config, Single | Client):
            more = ", or add strategy=ddp" if isinstance(config, Single) else ""
            raise ConfigError(f"device: {device!r}; strategy={config.kind} takes one{more}")
        if len(found) == 1 and isinstance(config, Placement):
            take = "0,1 or cpu,0" if torch.cuda.is_available() else "cpu,cpu: there is no GPU"
            raise ConfigError(f"device: {device!r}; strategy=placement takes several, as {take}")
        return config
    if len({one.type for one in found}) > 1 or (found[0].type == "cpu" and len(found) > 1):
        raise ConfigError(
            f"device: {device!r}; processes share the CPU or take a GPU each, so take cpu or "
            "numbers, or strategy=placement"
        )
    if isinstance(config, FSDP) and config.offload and found[0].type == "cpu":
        raise ConfigError(
            "strategy.offload: true on the CPU, where everything lies already; leave it out"
        )
    return _settle_processes(config, device, found, told)


def _refuse_mixed(
    config: ParameterServer | Federated, device: str, found: Sequence[torch.device]
) -> None:
    """Refuse devices that Ray cannot hand out.

    Raises:
        ConfigError: naming them.
    """
    who = "clients" if isinstance(config, Federated) else "workers"
    if len({one.type for one in found}) > 1 or (found[0].type == "cpu" and len(found) > 1):
        raise ConfigError(
            f"device: {device!r}; {who} share the CPU or take GPUs, so take cpu or cuda"
        )
    if found[0].type != "cpu" and device not in ("auto", "cuda"):
        raise ConfigError(
            f"device: {device!r}; Ray hands out the GPUs, take cuda and name them in "
            "CUDA_VISIBLE_DEVICES"
        )


def _settle_workers(config: ParameterServer, found: Sequence[torch.device]) -> ParameterServer:
    if found[0].type == "cpu":
        return config
    if "processes" not in config.model_fields_set:
        return config.model_copy(update={"processes": len(found)})
    if config.address is None and config.processes > len(found):
        raise ConfigError(
            f"strategy.processes: {config.processes}; here are {len(found)} GPUs, one worker takes "
            "one (or take device=cpu)"
        )
    return config


def _settle_processes(
    config: G, device: str, found: Sequence[torch.device], told: Launched | None
) -> G:
    if told is not None:
        config = _as_told(config, located() or told)
    elif "processes" not in config.model_fields_set and found[0].type == "cuda":
        config = config.model_copy(update={"processes": len(found)})
    elif "," in device and config.processes < len(found):
        raise ConfigError(
            f"strategy.processes: {config.processes}; device={device} names {len(found)} GPUs, "
            "name as many, or leave one of the two out"
        )
    given_out = told is not None and len(found) == 1  # as Slurm may give each task a GPU
    if found[0].type == "cuda" and config.processes > len(found) and not given_out:
        raise ConfigError(  # CPUs are shared
            f"strategy.processes: {config.processes}; device={device} is {len(found)} GPUs, "
            "one process takes one (or take device=cpu)"
        )
    return config


def own_device(device: str, told: Launched) -> torch.device:
    """Return this process's device among those of its machine.

    Raises:
        ConfigError: this machine has fewer GPUs than processes, which rank 0 cannot know.
    """
    found = devices(device)
    rank = told.local_rank or 0
    if 1 < len(found) <= rank:
        raise ConfigError(
            f"device: {device} is {len(found)} GPUs on {gethostname()} for {told.local_world} "
            "processes; start as many on every machine as it has GPUs"
        )
    return found[rank] if len(found) > 1 else found[0]


def world(config: StrategyConfig) -> int:
    """Return how many processes a settled mode has, over all machines."""
    if isinstance(config, Alone):
        return started_by(config) or 1
    told = launched()
    return config.processes if told is None else told.world


def started_by(config: StrategyConfig) -> int | None:
    """Return how many processes train that a mode starts itself."""
    if isinstance(config, ParameterServer):
        return config.processes
    if isinstance(config, Federated) and config.serve is None:
        return min(config.clients, config.processes or cores())
    return None


def threads_started(config: StrategyConfig) -> int | None:
    """Return how many CPU threads each of the processes gets that a mode starts itself."""
    count = started_by(config)
    if count is None or not isinstance(config, ParameterServer | Federated):
        return None
    return config.threads or max(1, cores() // count)


def _as_told(config: G, told: Launched) -> G:
    here = told.local_world or told.world
    if "processes" in config.model_fields_set and config.processes != here:
        raise ConfigError(
            f"strategy.processes: {config.processes}; {told.by} started {here} here, leave it out"
        )
    if config.max_restarts != Group().max_restarts:
        raise ConfigError(
            f"strategy.max_restarts: {config.max_restarts}; {told.by} would have to start its "
            "processes again (torchrun: --max-restarts), leave it out"
        )
    return config.model_copy(update={"processes": here})


def let_go() -> None:
    """Give back the GPU memory of what is no longer used: other processes share the GPUs.

    Models and what trains them refer to each other, so that they stay until they are looked for.
    """
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()
