"""The base of every config section: frozen, typed, no unknown keys."""

from __future__ import annotations

import os

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config. Values are checked when made and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def wandb_key_set() -> bool:
    """Say whether $WANDB_API_KEY is set: only then does wandb send anything."""
    return bool(os.environ.get("WANDB_API_KEY"))
