"""Clients on machines of their own, by Flower's link between them and this one."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.error import URLError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from visiontrain.core.durable import replace_file, to_json
from visiontrain.core.errors import ConfigError, RankError
from visiontrain.strategies.federated.apps import SOCKET
from visiontrain.strategies.federated.config import Federated, takers
from visiontrain.strategies.federated.engine import Answer, Bytes
from visiontrain.strategies.federated.flower_environment import flower_environment
from visiontrain.strategies.federated.keys import CA, CERTIFICATE, KEY, check_folder, registered
from visiontrain.strategies.federated.relay import Relayed
from visiontrain.strategies.federated.superlink import READY

_tell = logging.getLogger(__name__).warning
START_S, COMMAND_S, END_S, LOOK_S = 120.0, 300.0, 10.0, 5.0
POLL_S = 0.2
CONNECTION = "server"  # Flower's name for the way to the link
PROJECT = """\
[project]
name = "visiontrain-federated"
version = "1.0.0"
description = "Names what is installed with visiontrain."
license = "Apache-2.0"
[tool.flwr.app]
publisher = "visiontrain"
[tool.flwr.app.components]
serverapp = "visiontrain_federated.server:app"
clientapp = "visiontrain_federated.client:app"
"""
FLWR = """\
import json, sys
from flwr.cli.app import app
for words in json.loads(sys.argv[1]):
    app(words, standalone_mode=False)
"""
SERVER = "from visiontrain.strategies.federated.apps import server_app\n\napp = server_app()\n"
CLIENT = "from flwr.clientapp import ClientApp\n\napp = ClientApp()  # clients run their own\n"


class Deployment:
    """Runs Flower's link beside the training loop; see `Engine`."""

    joins = True

    def __init__(self, config: Federated, folder: Path) -> None:
        """Prepare.

        Args:
            config: of the mode.
            folder: of the run, for the order of its clients.
        """
        assert config.serve is not None
        self._config, self._keys = config, Path(config.keys).absolute()
        host, _, port = config.serve.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._order = folder / "clients" / "keys.json"
        self.at_once = config.clients
        self._scratch = Path(tempfile.mkdtemp(prefix="visiontrain-"))  # nobody else may enter it
        self._log, self._ready = self._scratch / "link.log", self._scratch / "ready"
        self._listener = socket.socket(socket.AF_UNIX)
        self._link: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._relayed: Relayed
        self._seen: list[int] = []
        self._stopping: Callable[[], bool] = lambda: False

    # -- start --------------------------------------------------------------------

    def open(self, stopping: Callable[[], bool]) -> None:
        """Start the link, let the clients in whose keys there are, and start a run; see `Engine`.

        Raises:
            ConfigError: keys or certificates are missing, or the port is taken.
            RankError: Flower does not start.
        """
        check_folder(self._keys)
        clients = registered(self._keys)
        least = self._config.min_fit or takers(self._config)
        if len(clients) < least:
            raise ConfigError(
                f"strategy.clients: a round takes {least}, but {len(clients)} are registered in "
                f"{self._keys}; add theirs with `visiontrain federated register key=FILE.pub "
                f"keys={self._keys}`, or let rounds take fewer with strategy.min_fit"
            )
        self._refuse_taken()
        path = str(self._scratch / "relay")
        self._listener.bind(path)
        self._listener.listen(1)
        self._start(path)
        self._write_home()
        words = [["supernode", "register", str(client), CONNECTION] for client in clients]
        self._commands([*words, ["run", str(self._write_app()), CONNECTION]])
        self._ready.touch()
        self._stopping = stopping
        self._relayed = Relayed(self._accepted(), self._numbered(clients), stopping)

    def _refuse_taken(self) -> None:
        """Refuse a port that another program has: its answers would be taken for the link's.

        Raises:
            ConfigError: it has.
        """
        try:
            with socket.create_server((self._host, self._port)):
                pass
        except OSError as error:
            raise ConfigError(f"strategy.serve: {self._config.serve}; {error.strerror}") from error

    def _numbered(self, clients: list[Path]) -> list[str]:
        """Return the clients' keys in the order of their numbers, which they keep in a run."""
        text = {path.read_text().strip(): path.stem for path in clients}
        kept = json.loads(self._order.read_text()) if self._order.is_file() else []
        keys = [*kept, *(key for key in text if key not in kept)]
        self._order.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._order, to_json(keys))
        named = [f"{k} {text[key]}" for k, key in enumerate(keys) if key in text]
        _tell(f"clients may join at {self._config.serve}: {', '.join(named)}")
        return keys

    def _environment(self, **more: str) -> dict[str, str]:
        """Return what Flower's programs are told, which find each other on the PATH."""
        beside = str(Path(sys.executable).parent)
        path = os.pathsep.join([beside, os.environ.get("PATH", "")])
        home = str(self._scratch / "home")
        here = os.pathsep.join(sys.path)
        told = {"PATH": path, "FLWR_HOME": home, "PYTHONPATH": here}
        return flower_environment() | told | more

    def _start(self, relay: str) -> None:
        """Start the link and wait until it answers.

        Args:
            relay: the socket that the run's process will find this one at.

        Raises:
            ConfigError: it does not.
        """
        words = [
            *(sys.executable, "-m", "visiontrain.strategies.federated.superlink"),
            *("--host", self._host, "--port", str(self._port)),
            *("--ssl-ca-certfile", str(self._keys / CA)),
            *("--ssl-certfile", str(self._keys / CERTIFICATE)),
            *("--ssl-keyfile", str(self._keys / KEY)),
            *("--enable-supernode-auth", "--disable-runtime-dependency-installation"),
        ]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - ours
                words,
                env=self._environment(**{SOCKET: relay, READY: str(self._ready)}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the training
            )
        context = ssl.create_default_context(cafile=str(self._keys / CA))
        direct = build_opener(ProxyHandler({}), HTTPSHandler(context=context))
        end = time.monotonic() + START_S
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with direct.open(f"https://{self._here()}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(POLL_S)
        raise ConfigError(
            f"strategy.serve: {self._config.serve}; Flower's link does not answer at "
            f"{self._here()}: is the port taken?\n{self._said()}"
        )

    def _here(self) -> str:
        """Return the link's address for this machine, which its certificate names."""
        return f"127.0.0.1:{self._port}"

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-5:])

    def _write_home(self) -> None:
        home = self._scratch / "home"
        home.mkdir(exist_ok=True)
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "{self._here()}"\n'
            f"root-certificates = {json.dumps(str(self._keys / CA))}\n"
        )
        (home / "config.toml").write_text(text)

    def _write_app(self) -> Path:
        """Write the project that a run of Flower's is made of: names, and no code of its own."""
        folder = self._scratch / "app"
        package = folder / "visiontrain_federated"
        package.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(PROJECT)
        for name, text in {"__init__": "", "server": SERVER, "client": CLIENT}.items():
            (package / f"{name}.py").write_text(text)
        return folder

    def _commands(self, commands: Sequence[Sequence[str]]) -> None:
        """Run `flwr` with these words, one after the other in one process: each takes seconds.

        Raises:
            RankError: one fails.
        """
        try:
            done = subprocess.run(  # noqa: S603 - ours
                [sys.executable, "-c", FLWR, json.dumps(commands)],
                env=self._environment(),
                capture_output=True,
                text=True,
                timeout=COMMAND_S,
                check=False,
                start_new_session=True,  # Ctrl-C is for the training
            )
        except subprocess.TimeoutExpired:
            raise RankError(
                f"strategy: federated; Flower's link took no commands in {COMMAND_S:g} s"
            ) from None
        if done.returncode:
            said = (done.stdout + done.stderr).strip()
            raise RankError(f"strategy: federated; Flower's link refuses: {said[-500:]}")

    def _accepted(self) -> Connection:
        """Wait for the process that Flower starts for this run.

        Raises:
            RankError: it does not come.
        """
        self._listener.settimeout(START_S)
        try:
            accepted, _ = self._listener.accept()
        except TimeoutError:
            raise RankError(
                f"strategy: federated; Flower started no run in {START_S:g} s\n{self._said()}"
            ) from None
        accepted.setblocking(True)
        self._link = Connection(accepted.detach())
        return self._link

    # -- while it goes on ---------------------------------------------------------

    def clients(self, count: int, seconds: float) -> list[int]:
        """Return the numbers of the clients that are there, ascending; tell who came or went."""
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            there = self._relayed.find(count if left else 0, min(LOOK_S, left))
            if there != self._seen:
                who = ", ".join(map(str, there)) or "none"
                _tell(f"{len(there)} of {self._config.clients} clients are there: {who}")
                self._seen = there
            if len(there) >= count or not left or self._stopping():
                return there

    def ask(self, messages: Mapping[int, Bytes], seconds: float, enough: int) -> dict[int, Answer]:
        """Ask clients."""
        return self._relayed.ask(messages, seconds, enough)

    def close(self) -> None:
        """End the run and the link."""
        if self._link is not None:
            self._relayed.end()
            self._link.close()
        self._listener.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)
