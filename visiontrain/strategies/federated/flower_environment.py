"""What Flower reads of the environment when it is imported: report nothing, install nothing."""

from __future__ import annotations

import os

from visiontrain.strategies.federated.programs import PARENT

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
# Who may say where a call comes from; another interface of Flower's link, which has no door.
LEFT_OUT = ("FORWARDED_ALLOW_IPS", "FLWR_INTERNAL_")
PROXIES = ("NO_PROXY", "no_proxy")  # its programs of one machine call each other
NEAR = "127.0.0.1,localhost"


def flower_environment() -> dict[str, str]:
    """Return the environment of a program of Flower's that this one starts."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LEFT_OUT)}
    near = {name: ",".join(filter(None, [os.environ.get(name), NEAR])) for name in PROXIES}
    return kept | QUIET | near | {PARENT: str(os.getpid())}


def set_flower_environment() -> None:
    """Set it; programs that Flower starts inherit it."""
    os.environ.update(QUIET)
