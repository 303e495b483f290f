"""A client of a federated run on a machine of its own: what it agrees to, and how it joins."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from visiontrain.client import Client
from visiontrain.core.config import build
from visiontrain.core.durable import replace_file
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.interfaces import VisionModel
from visiontrain.core.own import missing
from visiontrain.data.defects import printable
from visiontrain.data.open import open_dataset
from visiontrain.data.partition import no_images
from visiontrain.engine.run_folder import home
from visiontrain.federated_config import EVERY, ClientConfig
from visiontrain.models.registry import build_model
from visiontrain.recipe import Run
from visiontrain.run_checks import check_values
from visiontrain.strategies.devices import devices
from visiontrain.strategies.federated.config import KEPT, Federated, takers
from visiontrain.strategies.federated.flower_environment import flower_environment
from visiontrain.strategies.federated.messages import (
    SENT,
    digest_of,
    names_of_norms,
    part_of,
    read_meta,
    shared,
)
from visiontrain.strategies.federated.programs import put_client_program
from visiontrain.strategies.precision import slow
from visiontrain.strategies.tensor_message import Bytes
from visiontrain.tasks.registry import as_task

CONFIG = "VISIONTRAIN_CLIENT"  # in the environment: the file that has a client's settings
LOG, OVER = "client.log", "over"  # in its folder
PROGRAM = """\
from visiontrain.strategies.federated.apps import client_program
client_program("visiontrain.worker")"""
SUPERNODE = """\
from visiontrain.strategies.federated.programs import end_with_parent
end_with_parent()
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""
REFUSED = "[code: 2004] Failed to activate SuperNode"  # what Flower says where a key is unknown
# Flower says so, too, of a client that ended without a word, until it misses that.
REFUSED_S = 90.0
POLL_S, AGAIN_S, END_S, REACH_S = 0.5, 5.0, 10.0, 10.0
PORTS = 1 << 16

CERTIFICATE, PRIVATE = b"-----BEGIN CERTIFICATE", b"-----BEGIN OPENSSH PRIVATE KEY"

Say = Callable[[str], Any]


# -- what it agrees to --------------------------------------------------------------


def agreed(config: ClientConfig, spec: Any) -> Run:
    """Return the run that a server describes, if this client takes part in it.

    Raises:
        ConfigError: it does not, or the description cannot be used.
    """
    if not isinstance(spec, dict) or not spec.keys() <= set(SENT):
        raise ConfigError("federated: a server that describes no run; is its version another?")
    own = {"data": config.data.model_dump(), "device": config.device, "out": config.out}
    run = build(Run, {**spec, **own, "ema": False})
    check_values(run)
    if missing(run):
        raise ConfigError("federated: this server's run needs objects of Python, which none sends")
    if not isinstance(run.strategy, Federated) or run.strategy.rounds is None:
        raise ConfigError("strategy: a server whose run is not federated")
    kind, rounds = run.model.kind, run.strategy.rounds
    if config.models and kind not in config.models:
        raise ConfigError(f"models: this client trains {', '.join(config.models)}, not {kind}")
    if config.max_rounds is not None and rounds > config.max_rounds:
        raise ConfigError(f"max_rounds: this client trains {config.max_rounds}, not {rounds}")
    epochs = rounds * run.strategy.local_epochs
    if config.max_epochs is not None and epochs > config.max_epochs:
        raise ConfigError(
            f"max_epochs: this client trains {config.max_epochs}, not {epochs} (strategy.rounds x "
            "strategy.local_epochs)"
        )
    least = run.strategy.min_fit or takers(run.strategy)
    if least < config.min_clients:
        raise ConfigError(
            f"min_clients: this client wants {config.min_clients} results in a round, not {least}"
        )
    return run


def check_parts(config: ClientConfig, run: Run, classes: int) -> None:
    """Refuse a run in which parts would leave that are to stay.

    Raises:
        ConfigError: naming them.
    """
    assert isinstance(run.strategy, Federated)
    stays = set(EVERY) - set(config.share)
    if not stays:
        return
    with torch.device("meta"):
        model = build_model(run.model, classes, run.task.kind)
    _refuse_unknown(model, stays, run.model.kind)
    up, norms = shared(model, run.strategy.local).up, names_of_norms(model)
    leaves = {part_of(model, name) for name in up} | {"norm" for name in up if name in norms}
    if leaves & stays:
        raise ConfigError(
            f"share: this client keeps {', '.join(sorted(leaves & stays))}; the server needs "
            "strategy.local with it"
        )


def _refuse_unknown(model: VisionModel, stays: set[str], kind: str) -> None:
    """Refuse to keep a part that cannot be told from others: of models that are one block."""
    parts = {part_of(model, name) for name in model.state_dict()}
    asked = stays & {"neck", "head"}
    if len(model.blocks) > 1 or not asked:
        return
    if parts == {"backbone"} or asked == {"neck"}:  # which is counted with the head there
        raise ConfigError(
            f"share: this client keeps {', '.join(sorted(asked))}, which nobody can tell from the "
            f"rest of {kind}, a model of one block"
        )


# -- one message --------------------------------------------------------------------


def client_of(config: ClientConfig, message: Bytes, number: int) -> Client:
    """Make the client that a message is for.

    Raises:
        ConfigError: it does not take part.
        DataError: its images have other classes.
    """
    meta = read_meta(message)
    run = agreed(config, meta.get("run"))
    assert isinstance(run.strategy, Federated)
    number_of_round, rounds = meta.get("round"), run.strategy.rounds or 0
    last = rounds - (meta.get("kind") == "train")
    if not isinstance(number_of_round, int) or not 0 <= number_of_round <= last:
        raise DataError(f"federated: round {number_of_round} of {rounds}")
    spec = open_dataset(run.data, run.task.kind)
    if digest_of(spec.names) != meta.get("classes"):
        raise DataError(
            f"data: {run.data.source} has the classes {', '.join(spec.names[:8])}, not those of "
            "the server; name them alike, in the same order (data.single_cls=true makes them one)"
        )
    check_parts(config, run, len(spec.names))
    device = devices(config.device)[0]
    if slow(run.precision, device):  # weights, which travel, are of 32 bits all the same
        run = run.model_copy(update={"precision": "fp32"})
    train = as_task(spec.table("train"), run.task)
    val = as_task(spec.table("val"), run.task) if "val" in spec.splits else no_images(train)
    folder = Path(config.out) / "states" / identity(run, number)
    return Client(run, number, (train, val), folder, device)


def identity(run: Run, number: int) -> str:
    """Name what a client keeps of a run, also when that goes on with other keys."""
    known = {"model": run.model.model_dump(mode="json"), "seed": run.seed, "number": number}
    known |= {key: getattr(run.strategy, key) for key in KEPT}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def answer(config: ClientConfig, message: Bytes, number: int) -> Bytes:
    """Answer a message, and note in the client's log what was done.

    Raises:
        VisiontrainError: with one line for the server, which is noted too.
    """
    meta = read_meta(message)
    if meta.get("kind") == "over":
        replace_file(Path(config.out) / OVER, b"")
        return message
    began = time.monotonic()
    try:
        client = client_of(config, message, number)
        found = client.answer(message)
    except Exception as error:
        note(config, f"{what(meta)}: not done: {error}")
        raise
    seconds = time.monotonic() - began
    note(config, f"{what(meta)}: done in {seconds:.0f} s, {found.nbytes / 1e6:.3g} MB go back")
    return found


def what(meta: Mapping[str, Any]) -> str:
    """Name what a message asks for."""
    kind, number = str(meta.get("kind"))[:20], meta.get("round")
    shown = f" {int(number) + (kind == 'train')}" if isinstance(number, int) else ""
    return f"{kind}, round{shown}"


def note(config: ClientConfig, line: str) -> None:
    """Write a line into the client's log, which the program that the user started shows."""
    with (Path(config.out) / LOG).open("a") as file:
        file.write(printable(line).replace("\n", " ") + "\n")


# -- joining ------------------------------------------------------------------------


def read_config() -> ClientConfig:
    """Return the settings of the client whose process this is."""
    return ClientConfig.model_validate_json(Path(os.environ[CONFIG]).read_text())


def check_client_files(ca: Path, key: Path) -> None:
    """Refuse files that are missing, or something else.

    Raises:
        ConfigError: naming them.
    """
    for name, path, head in (("ca", ca, CERTIFICATE), ("key", key, PRIVATE)):
        if not path.is_file():
            advice = "make it with `visiontrain federated key`" if name == "key" else "ask for it"
            raise ConfigError(f"{name}: no file {path}; {advice}")
        if not path.read_bytes().startswith(head):
            wanted = "the server's ca.crt" if name == "ca" else "the file without .pub"
            raise ConfigError(f"{name}: {path} is something else; give {wanted}")


def join_server(config: ClientConfig, say: Say) -> int:
    """Be a client until the run is over, or for ever; return the exit code.

    Raises:
        ConfigError: a file is missing, the data cannot be used, or the server refuses the key.
    """
    host, _, port = config.server.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < PORTS:
        raise ConfigError(f"server: {config.server!r}; write HOST:PORT, as fed.example.org:9092")
    check_client_files(Path(config.ca), Path(config.key))
    if "," in config.device:
        raise ConfigError(f"device: {config.device!r}; a client takes one")
    if config.data.cache == "ram":
        raise ConfigError(
            "data.cache: ram at a client, whose process ends with each answer and the cache with "
            "it; take disk or none"
        )
    spec = open_dataset(config.data)
    for line in spec.remarks({s: spec.table(s) for s in ("train", "val") if s in spec.splits}):
        say(line)
    folder = home(config.out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OVER).unlink(missing_ok=True)
    data = config.data.model_copy(update={"source": spec.config.source})
    config = config.model_copy(update={"out": str(folder), "data": data})
    with tempfile.TemporaryDirectory(prefix="visiontrain-") as scratch:
        say(f"waits for {config.server}; what is done goes to {folder / LOG}")
        if why := out_of_reach(host, int(port)):
            say(f"nobody answers at {config.server} yet ({why}), goes on trying")
        return Joined(config, Path(scratch), say).run()


def out_of_reach(host: str, port: int) -> str:
    """Return why nothing can be heard at an address; an empty string where something can be."""
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=REACH_S):
            return ""
    except OSError as error:
        return error.strerror or str(error)


class Joined:
    """Flower's program for a client, and what it is at."""

    def __init__(self, config: ClientConfig, scratch: Path, say: Say) -> None:
        self._config, self._scratch, self._say = config, scratch, say
        self._over = Path(config.out) / OVER
        self._log = Path(config.out) / LOG
        self._log.touch()
        self._read = self._log.stat().st_size
        self._program = scratch / "supernode.log"
        put_client_program(scratch / "bin", PROGRAM)
        (scratch / "client.json").write_text(config.model_dump_json())

    def run(self) -> int:
        """Stay until it is over; start Flower's program again where it ends.

        Raises:
            ConfigError: the server refuses the key.
        """
        process, waits, refused = self._start(), "", None
        try:
            while not self._over.exists() or self._config.stay:
                time.sleep(POLL_S)
                self._show()
                if process.poll() is None:
                    continue
                now = time.monotonic()
                refused = (refused or now) if self._refused() else None
                if refused is not None and now - refused > REFUSED_S:
                    raise ConfigError(
                        f"key: {self._config.server} does not know {self._config.key}; give "
                        f"{self._config.key}.pub to whoever runs it, for `visiontrain federated "
                        "register`"
                    )
                if waits != (why := self._why()):
                    waits = why
                    self._say(f"{self._config.server} cannot be joined yet, goes on trying: {why}")
                time.sleep(AGAIN_S)
                process = self._start()
            # The answer to the last message is on its way.
            time.sleep(END_S)
            self._show()
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        self._say("the run is over")
        return 0

    def _start(self) -> subprocess.Popen[bytes]:
        config, scratch = self._config, self._scratch
        words = [
            *(sys.executable, "-c", SUPERNODE, "--superlink", config.server),
            *("--root-certificates", str(Path(config.ca).absolute())),
            *("--auth-supernode-private-key", str(Path(config.key).absolute())),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ]
        beside = [str(scratch / "bin"), str(Path(sys.executable).parent)]
        told = {
            "PATH": os.pathsep.join([*beside, os.environ.get("PATH", "")]),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "FLWR_HOME": str(scratch / "home"),
            CONFIG: str(scratch / "client.json"),
        }
        with self._program.open("wb") as log:
            return subprocess.Popen(  # noqa: S603 - ours
                words,
                env=flower_environment() | told,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for this program, which ends it
            )

    def _refused(self) -> bool:
        """Tell whether Flower's program ended since the server does not know the key."""
        return REFUSED in self._program.read_text(errors="replace")

    def _why(self) -> str:
        """Return what Flower's program said of why it ended."""
        lines = self._program.read_text(errors="replace").splitlines()
        code = next((k for k, line in enumerate(lines) if "Exit Code" in line), None)
        if code is None:  # it left at a 401, of which it says nothing
            return (
                "its signature was not taken; if it stays so, set this machine's clock, which may "
                "not be 5 s ahead of the server's or 5 min behind it"
            )
        return " ".join(lines[code + 1 : code + 3])

    def _show(self) -> None:
        """Say what was done since the last look."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            whole, _, _ = file.read().rpartition(b"\n")
        if whole:
            self._read += len(whole) + 1
            for line in whole.decode(errors="replace").splitlines():
                self._say(line)


def free_port() -> int:
    """Return a port of the loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
