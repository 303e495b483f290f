"""What modes of one process share."""

from __future__ import annotations

from visiontrain.core.config import Section


class Alone(Section):
    """Settings of a mode of one process, which may start others itself."""
