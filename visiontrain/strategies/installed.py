"""Whether a mode's library is installed (imports no torch)."""

from __future__ import annotations

import importlib.util

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.config import ParameterServer, StrategyConfig
from visiontrain.strategies.federated.config import Federated


def check_installed(config: StrategyConfig) -> None:
    """Refuse a mode whose library is not installed.

    Raises:
        ConfigError: naming what to install.
    """
    if isinstance(config, ParameterServer):
        find("ray", "strategy: parameter_server needs Ray", "ray")
    if isinstance(config, Federated):
        find("flwr", "strategy: federated needs Flower", "federated")
        if config.serve is None:
            find("ray", "strategy: federated needs Ray", "federated")


def find(module: str, need: str, extra: str) -> None:
    """Refuse to go on without a library.

    Raises:
        ConfigError: naming what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{need}; pip install 'visiontrain[{extra}]'")
