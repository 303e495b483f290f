"""WandbLogger: Weights & Biases, offline unless a key is set; nothing else leaves the machine."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from visiontrain.core.config import wandb_key_set
from visiontrain.loggers.config import LogConfig

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run as WandbRun

Mode = Literal["disabled", "offline", "online"]
REQUEUE = 75  # saved after SIGTERM or SIGUSR1: the scheduler starts the run again


class WandbLogger:
    """One wandb run per training run: resume continues it under the same id.

    An offline run lies in `OUT/wandb/`; `wandb sync OUT/wandb/offline-run-*` sends it. After a
    resume there is one such folder per start, all of one id: `wandb sync --append` the later ones.
    """

    name = "wandb"

    def __init__(self, config: LogConfig) -> None:
        self._config = config
        self._id = ""
        self._run: WandbRun | None = None

    def start(self, config: Mapping[str, Any], out: Path) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when wandb is imported
        import wandb  # noqa: PLC0415 - 1 s, only if used

        resumed, self._id = bool(self._id), self._id or secrets.token_hex(4)
        said = os.environ.get("WANDB_MODE", "")
        mode = choose_mode(self._config.wandb_mode, said, key=wandb_key_set())
        settings = wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=self._config.wandb_project,
            name=out.name,
            id=self._id,
            resume="allow" if resumed and mode == "online" else None,
            mode=mode,
            dir=str(out),
            config=dict(config),
            settings=settings,
            # A run that the user's own program has open stays theirs.
            reinit=None if wandb.run is None else "create_new",
        )
        self._run.define_metric("epoch")
        self._run.define_metric("*", step_metric="epoch")

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._open().log({**row, "step": step})

    def image(self, name: str, path: Path, step: int) -> None:
        import wandb  # noqa: PLC0415 - already imported by start

        self._open().log({name: wandb.Image(str(path)), "step": step})

    def state(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._id = str(state["id"])

    def close(self, *, exit_code: int = 0) -> None:
        if self._run is None:
            return
        if exit_code == REQUEUE:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
        self._run = None

    def _open(self) -> WandbRun:
        if self._run is None:
            raise RuntimeError("log before start")
        return self._run


def choose_mode(wanted: Mode | Literal["auto"], said: str, *, key: bool) -> Mode:
    """Return where to write: `auto` goes online only where there is a key.

    Args:
        wanted: what the config says.
        said: what $WANDB_MODE says, which `auto` follows.
        key: whether there is one.
    """
    if wanted != "auto":
        return wanted
    match said:
        case "offline" | "disabled":
            return said
        case "dryrun":  # its old name
            return "offline"
    return "online" if key else "offline"
