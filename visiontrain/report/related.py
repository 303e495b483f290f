"""What rows of a comparison say of each other: which is the control, and how the others differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from visiontrain.report.rows import Row


def control_of(rows: Sequence[Row]) -> Row | None:
    """Return what others are compared with: the first row of one device, else the first."""
    return next((r for r in rows if r.strategy["kind"] == "single"), rows[0] if rows else None)


def related(rows: Sequence[Row], *, cores: bool = True) -> list[Row]:
    """Add what only other rows tell: difference, noise, speed-up and efficiency.

    Efficiency is T1 / (W TW): W counts the CPU threads that a row has for each of the control's, or
    without `cores` its processes, each of which is a device.

    Noise is 2 s sqrt(1/n + 1/m) of n and m seeds, s the standard deviation of the control's, or of
    the other row's where that is larger: twice the standard error of a difference of means, as far
    as so few seeds tell it. Without a deviation of the control nothing is told.
    """
    control = control_of(rows)
    return [_related(row, control, cores=cores) for row in rows] if control else []


def _related(row: Row, control: Row, *, cores: bool) -> Row:
    alone = control.images_per_s if control.strategy["kind"] == "single" else None
    speedup = row.images_per_s / alone if row.images_per_s and alone else None
    score, theirs = row.score, control.score
    difference = score - theirs if score is not None and theirs is not None else None
    noise, word = noise_of(control, control, row), None
    if difference is not None and row.name != control.name:
        word = _word(difference, noise, control)
    return replace(
        row,
        difference=difference,
        noise=noise if word else None,
        word=word,
        speedup=speedup,
        efficiency=speedup / _times(row, control, cores=cores) if speedup else None,
    )


def _times(row: Row, control: Row, *, cores: bool) -> float:
    """Return how many times what the control has a row has to train with."""
    used, has = (
        (each.processes or 1) * ((each.threads or 1) if cores else 1) for each in (row, control)
    )
    return used / has


def noise_of(control: Row, one: Row, other: Row) -> float | None:
    """Return twice the standard error of a difference of two rows; see `related`.

    None where the control tells nothing: of one seed, or of seeds that all score the same.
    """
    if not control.spread or not one.seeds or not other.seeds:
        return None
    widest = max(row.spread or 0.0 for row in (control, one, other))
    return 2 * widest * math.sqrt(1 / len(one.seeds) + 1 / len(other.seeds))


def _word(difference: float, noise: float | None, control: Row) -> str:
    if noise is None:
        return "one seed" if control.spread is None else "no spread"
    if abs(difference) <= noise:
        return "within noise"
    return "better" if difference > 0 else "worse"
