"""What `visiontrain federated` does beside serving: certificates, keys, and being a client."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from visiontrain.core.section import Section
from visiontrain.federated_config import CertConfig, ClientConfig, KeyConfig, RegisterConfig
from visiontrain.strategies.installed import find

Say = Callable[[str], Any]


def federated(config: Section, say: Say) -> int:
    """Do what a config is for; return the exit code.

    Raises:
        VisiontrainError: with one line for the user.
    """
    find("flwr", "federated: it needs Flower", "federated")
    return DO[type(config)](config, say)


def _cert(config: CertConfig, say: Say) -> int:
    from visiontrain.strategies.federated.keys import CA, make_certificates  # noqa: PLC0415

    folder = Path(config.keys)
    hosts = make_certificates(folder, config.hosts)
    say(f"certificates for {', '.join(hosts)}: {folder}; clients need {folder / CA}, no other file")
    return 0


def _key(config: KeyConfig, say: Say) -> int:
    from visiontrain.strategies.federated.keys import make_key  # noqa: PLC0415

    public = make_key(Path(config.key))
    say(f"key: {config.key}, which nobody else may have; give {public} to whoever runs the server")
    return 0


def _register(config: RegisterConfig, say: Say) -> int:
    from visiontrain.strategies.federated.keys import register, registered  # noqa: PLC0415

    place = register(Path(config.key), Path(config.keys))
    names = [path.stem for path in registered(Path(config.keys))]
    say(f"{place.stem} may join from the server's next start on; registered: {', '.join(names)}")
    return 0


def _client(config: ClientConfig, say: Say) -> int:
    from visiontrain.deployed import join_server  # noqa: PLC0415 - takes torch along

    return join_server(config, say)


DO: dict[type[Section], Callable[..., int]] = {
    CertConfig: _cert,
    KeyConfig: _key,
    RegisterConfig: _register,
    ClientConfig: _client,
}
