"""TensorboardLogger: event files in the run folder, for `tensorboard --logdir runs`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from visiontrain.core.errors import ConfigError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorboardLogger:
    """Writes scalars by step, pictures, and the config as text.

    Raises:
        ConfigError: when the optional package is not installed.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "log.to: tensorboard is not installed; "
                "pip install 'visiontrain[tensorboard]', or leave it out of log.to"
            )
        self._writer: SummaryWriter | None = None
        self._step = -1

    def start(self, config: Mapping[str, Any], out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - 1 s, only if used

        # Events past the checkpoint, if any, are hidden by what the resumed run writes.
        purge = self._step + 1 if self._step >= 0 else None
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge)
        text = json.dumps(config, indent=2, default=str)
        self._open().add_text("config", f"```\n{text}\n```", max(self._step, 0))

    def log(self, row: Mapping[str, float], step: int) -> None:
        writer = self._open()
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(key, value, step)
        writer.flush()
        self._step = step

    def image(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._open().add_image(name, pixels, step, dataformats="HWC")

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])

    def close(self, *, exit_code: int = 0) -> None:
        if self._writer is not None:
            self._writer.add_text("exit_code", str(exit_code), max(self._step, 0))
            self._writer.close()
            self._writer = None

    def _open(self) -> SummaryWriter:
        if self._writer is None:
            raise RuntimeError("log before start")
        return self._writer
