"""What Flower reads of the environment when it is imported: report nothing, install nothing."""

from __future__ import annotations

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def flower_environment() -> dict[str, str]:
    """Return it."""
    return dict(QUIET)


def set_flower_environment() -> None:
    """Set it; programs that Flower starts inherit it."""
    os.environ.update(QUIET)
