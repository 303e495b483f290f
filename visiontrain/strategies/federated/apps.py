"""What runs in processes that Flower starts for a deployment, on the server and at clients.

A run of Flower's brings code along, which its `flwr-clientapp` installs and runs. Here a client
runs what is installed with visiontrain, whatever came: nothing of that is installed or imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.federated.flower import Clients, client_app
from visiontrain.strategies.federated.keys import pem_of
from visiontrain.strategies.federated.programs import end_after
from visiontrain.strategies.federated.relay import carry

SOCKET = "VISIONTRAIN_RELAY"  # in the environment: where training listens
RUNNING = "flwr.supernode.runtime.run_clientapp"
PROGRAM = "flwr.supernode.cli.flwr_clientapp"
OF_PARENT = "--parent-pid"  # whose number follows, of what Flower tells its programs
CHANGED = ("install_from_fab", "get_project_dir", "get_load_client_app_fn")


def server_app() -> ServerApp:
    """Make Flower's side of a server: it hands its grid on."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        with Client(os.environ[SOCKET], "AF_UNIX") as link:
            carry(lambda keys: Clients(grid, [pem_of(key) for key in keys]), link)

    return app


def client_program(module: str) -> None:
    """Run `flwr-clientapp` with an app of ours in the place of what comes with a run.

    Args:
        module: that has `joined`, which makes what answers messages. It is imported when Flower has
            taken the message up: without a sign of life for 30 s, it would start another program.

    Raises:
        ConfigError: this Flower looks different inside.
    """
    if OF_PARENT in sys.argv:
        end_after(int(sys.argv[sys.argv.index(OF_PARENT) + 1]))
    running = import_module(RUNNING)
    missing = [name for name in CHANGED if not hasattr(running, name)]
    if missing:
        raise ConfigError(
            f"strategy: federated; this Flower has no {', '.join(missing)}, so code that a server "
            "sends cannot be kept out; take flwr>=1.41,<1.43"
        )

    def installs(*came: Any, **more: Any) -> None:
        del came, more

    def folder(*came: Any) -> Path:
        del came
        return Path.cwd()

    def loads(*asked: Any, **more: Any) -> Callable[..., Any]:
        del asked, more

        def ours(*came: Any) -> Any:
            del came
            return client_app(import_module(module).joined())

        return ours

    changed = dict(zip(CHANGED, (installs, folder, loads), strict=True))
    for name, function in changed.items():
        setattr(running, name, function)
    import_module(PROGRAM).flwr_clientapp()
