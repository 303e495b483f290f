"""Which devices `device=` names, and whether a mode can use them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.config import FSDP, Group, Single, StrategyConfig

G = TypeVar("G", bound=Group)


def devices(text: str) -> list[torch.device]:
    """List the devices that `device=` names: auto, cpu, cuda, cuda:1, or numbers as 0,1.

    Raises:
        ConfigError: there is no such device.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not found):
        return [torch.device("cpu")]
    numbers = text.removeprefix("cuda").removeprefix(":")
    wanted = range(found) if text == "auto" or not numbers else numbers.split(",")
    if not all(str(number).strip().isdecimal() for number in wanted):
        raise ConfigError(f"device: {text!r}; take auto, cpu, cuda, or GPU numbers such as 0,1")
    indices = [int(number) for number in wanted]
    if not indices or max(indices) >= found:
        raise ConfigError(f"device: {text!r}; torch sees {found} GPUs here, take device=cpu")
    return [torch.device("cuda", index) for index in indices]


def threads(config: Group) -> int:
    """Return how many CPU threads one process gets."""
    return config.threads or max(1, cores() // config.processes)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def settle(config: StrategyConfig, device: str) -> StrategyConfig:
    """Return the mode as it will run here: under torchrun, that says how many processes.

    Raises:
        ConfigError: when it cannot run on these devices, or not under torchrun.
    """
    found = devices(device)
    if isinstance(config, Single):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                "strategy: single under torchrun; start it without, or take strategy=ddp"
            )
        if "," in device:
            raise ConfigError(f"device: {device!r}; strategy=single takes one, or add strategy=ddp")
        return config
    if isinstance(config, FSDP) and config.offload and found[0].type == "cpu":
        raise ConfigError(
            "strategy.offload: true on the CPU, where everything lies already; leave it out"
        )
    return _settle_processes(config, device, found)


def _settle_processes(config: G, device: str, found: Sequence[torch.device]) -> G:
    if under_torchrun():
        config = _told_by_torchrun(config)
    elif "processes" not in config.model_fields_set and found[0].type == "cuda":
        config = config.model_copy(update={"processes": len(found)})
    elif "," in device and config.processes < len(found):
        raise ConfigError(
            f"strategy.processes: {config.processes}; device={device} names {len(found)} GPUs, "
            "name as many, or leave one of the two out"
        )
    if found[0].type == "cuda" and config.processes > len(found):  # CPUs are shared
        raise ConfigError(
            f"strategy.processes: {config.processes}; device={device} is {len(found)} GPUs, "
            "one process takes one (or take device=cpu)"
        )
    return config


def under_torchrun() -> bool:
    """Tell whether torchrun, or another launcher that speaks its variables, started this."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def world(config: StrategyConfig) -> int:
    """Return how many processes a settled mode has, over all machines."""
    if isinstance(config, Single):
        return 1
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else config.processes


def is_first() -> bool:
    """Tell whether this process prepares the run: all do but those that rank 0 tells."""
    return os.environ.get("RANK", "0") == "0"


def _told_by_torchrun(config: G) -> G:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if "processes" in config.model_fields_set and config.processes != here:
        raise ConfigError(
            f"strategy.processes: {config.processes}; torchrun started {here} here, leave it out"
        )
    return config.model_copy(update={"processes": here})
