"""What Ray reads of the environment when it is imported: ask for a token, report nothing."""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from visiontrain.core.errors import ConfigError

QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
TLS = {
    "RAY_TLS_CA_CERT": "ca.crt",
    "RAY_TLS_SERVER_CERT": "tls.crt",
    "RAY_TLS_SERVER_KEY": "tls.key",
}
# Without it a Ray that starts here listens to other machines, whatever address it is given.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


def set_environment(mode: str, address: str | None = None, tls: str | None = None) -> None:
    """Set what Ray reads, once and for all runs of this process: it does not look again.

    Args:
        mode: that wants it.
        address: of a cluster to join; else one starts here.
        tls: folder of certificates.

    Raises:
        ConfigError: Ray was imported before, without a token, or a certificate is missing.
    """
    if "ray" in sys.modules and os.environ.get(MODE) != "token":
        raise ConfigError(
            f"strategy: {mode}, but Ray was imported here without {MODE}=token, and "
            "would let anybody in; start training before `import ray`, or set that before it"
        )
    os.environ.update(QUIET)
    os.environ[MODE] = "token"
    if address is None:
        os.environ.update(LOOPBACK_ONLY)
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
    if tls is None:
        return
    folder = Path(tls)
    for key, name in TLS.items():
        if not (folder / name).is_file():
            raise ConfigError(f"strategy.tls: {folder / name} is missing; make it, or name another")
        os.environ[key] = str(folder / name)
    os.environ["RAY_USE_TLS"] = "1"
