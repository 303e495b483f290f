"""How long a run took with the start and end of its processes, and how often they began again."""

from __future__ import annotations

import json
from dataclasses import replace

from visiontrain.core.durable import replace_file, storing, to_json
from visiontrain.engine.run_folder import RunFolder
from visiontrain.report.rows import Trial

WHOLE = "whole.json"  # in a run's folder; made once, by who saw it from its first to its last


def note_whole(folder: RunFolder, seconds: float, restarts: int) -> None:
    """Note how long a run took that is complete.

    Args:
        folder: of the run.
        seconds: of all of it; no measure of a run that lost some of its work.
        restarts: how often its processes were started again.

    Raises:
        StorageError: it cannot be written.
    """
    if not folder.metrics.is_file():
        return
    of = json.loads(folder.metrics.read_text(encoding="utf-8")).get("config_sha256")
    path, told = folder.path / WHOLE, None if restarts else seconds
    with storing(path):
        replace_file(path, to_json({"config_sha256": of, "seconds": told, "restarts": restarts}))


def whole_of(folder: RunFolder, config_sha256: str | None) -> tuple[float | None, int]:
    """Return how long a run took, where nothing interrupted it, and its restarts."""
    path = folder.path / WHOLE
    if not path.is_file():
        return None, 0
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["config_sha256"] != config_sha256:
        return None, 0
    return found["seconds"], found.get("restarts", 0)


def with_restarts(trial: Trial, restarts: int) -> Trial:
    """Add to what a trial lost to faults how often its processes were started again."""
    if not restarts:
        return trial
    return replace(trial, lost={**trial.lost, "restarts": restarts})
