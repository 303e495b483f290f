"""Settings of `visiontrain plan` (imports no torch)."""

from __future__ import annotations

from pydantic import Field

from visiontrain.recipe import USES as ALL_USES
from visiontrain.recipe import Run, Scaled


class PlanConfig(Scaled, Run):
    """A training, and what it is to run on."""

    devices: int | None = Field(
        None, ge=1, description="how many devices; default: strategy.processes, or 2"
    )
    memory: float | None = Field(
        None, gt=0, description="GiB that each device has; default: this machine's, shared by all"
    )
    measure: bool = Field(
        False, description="also train a few steps in each mode on this machine, and weigh them"
    )
    step_s: float | None = Field(
        None,
        gt=0,
        description="for links: seconds of a step elsewhere, parted as one here; default: as here",
    )


OWN = ("devices", "memory", "measure", *Scaled.model_fields, "step_s")  # keys that no training has
USES = (*OWN, *(key for key in ALL_USES["parity"] if key != "weights"))  # what may be typed
