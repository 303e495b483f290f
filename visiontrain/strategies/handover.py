"""Objects of the user's on their way to the processes that this one starts."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import cloudpickle
from torch import nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import short
from visiontrain.core.own import ARGUMENTS, Objects

FILE = "object-"


def hand_over(objects: Objects, folder: Path) -> None:
    """Write objects for `handed_over`, if there are any.

    Classes and functions of a script or a notebook go with their code, so that nothing needs to be
    imported from there. The folder is this user's alone and lives as long as the processes: no
    pickle ever comes from data, a config or another machine.

    Raises:
        ConfigError: an object cannot be pickled.
    """
    for key, value in objects.items():
        with (folder / f"{FILE}{key}").open("wb") as file:
            try:
                cloudpickle.dump(on_cpu(value), file)
            except OSError:  # of the disk
                raise
            except Exception as error:
                raise ConfigError(
                    f"{ARGUMENTS[key]}: {short(str(error))}; other processes need a copy of it: "
                    "open files, locks and the like where they are used"
                ) from error


def on_cpu(value: Any) -> Any:
    """Return a module's copy on the CPU: others may have no such GPU, or share it."""
    if not isinstance(value, nn.Module):
        return value
    tensors = (*value.parameters(), *value.buffers())
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return value
    return copy.deepcopy(value).cpu()


def handed_over(folder: Path) -> Objects:
    """Read what the process that started this one has written for it."""
    found = {}
    for path in folder.glob(f"{FILE}*"):
        with path.open("rb") as file:
            found[path.name.removeprefix(FILE)] = pickle.load(file)  # noqa: S301 - see `hand_over`
    return found
