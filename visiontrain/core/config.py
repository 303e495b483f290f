"""The base of every config section: frozen, typed, no unknown keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the config. Values are checked when made and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
