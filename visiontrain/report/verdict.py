"""What a comparison says in words: which mode to take, and why, out of its figures alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from visiontrain.report.related import control_of, noise_of
from visiontrain.report.rows import NOT_MEASURED, Row

FASTER = 1.05  # times the control's speed: less is no reason to take another mode
SMALLER = 0.9  # of the control's memory, likewise
ERROR = "twice the standard error that the seeds give"
WIDE = 0.1  # of the control's score: noise beyond which nearness says nothing
APART = ("single", "ddp", "fsdp", "pipeline")  # modes of which every process is measured by itself
LITTLE = 0.1  # a score of the control below which differences say nothing yet


def verdict(rows: Sequence[Row], title: str) -> list[str]:
    """Say what to take, one sentence each; the first is the answer.

    Args:
        rows: of the comparison, as `related` gives them.
        title: of the main score.
    """
    control, done = control_of(rows), [row for row in rows if row.seeds]
    if control is None or control not in done:
        return ["Nothing can be said: the control run has no result."]
    modes = [row for row in done if row.strategy["kind"] != "client"]
    said = [_choice(modes, control, title)]
    said += [_noise(modes, control)]
    said += _memory(modes, control)
    said += [_federated(row, done, control, title) for row in modes if row.rounds]
    said += [
        f"{row.name} is better: {title} {row.difference:+.3f}, more than {ERROR} "
        f"({row.noise:.3f}), at {_times(row, control):.2f} times the speed."
        for row in _better(modes, control)
        if not said[0].startswith(f"Take {row.name}:")
    ]
    said += _worse(modes, control, title)
    failed = [row.name for row in rows if row.error]
    said += [f"Failed, with the error below: {', '.join(failed)}."] if failed else []
    return [sentence for sentence in said if sentence]


def alike(row: Row, control: Row) -> bool:
    """Tell whether a row's results are the control's but for rounding.

    Exactness is measured against one device with the row's own keys, so that it says this only of
    a row with the control's keys and samples, and only of a control that is one device or exact.
    """
    if row is control:
        return True
    known = control.strategy["kind"] == "single" or control.exactness == "exact"
    same = row.keys == control.keys and row.samples == control.samples
    return known and same and row.exactness == "exact"


def good(row: Row, control: Row) -> bool:
    """Tell whether a row's score can stand for the control's."""
    near = row.word == "within noise" and (row.noise or 0.0) <= WIDE * (control.score or 0.0)
    told = not _little((control, row)) and (near or row.word == "better")
    return alike(row, control) or told


def _little(rows: Sequence[Row]) -> bool:
    """Tell whether scores say nothing yet: of none of the rows."""
    known = [row.score for row in rows if row.score is not None]
    return bool(known) and max(known) < LITTLE


def _choice(modes: Sequence[Row], control: Row, title: str) -> str:
    one = control.strategy["kind"] == "single"
    absent = "" if one else f" No control of one device was run: compared with {control.name}."
    candidates = [row for row in modes if good(row, control) and row.images_per_s]
    fastest = max(candidates, key=lambda row: row.images_per_s or 0.0, default=control)
    times = _times(fastest, control)
    better = max(_better(modes, control), key=lambda row: row.score or 0.0, default=None)
    if times < FASTER and better and _times(better, control) * FASTER > 1:
        return f"Take {better.name}: {_why(better, control, title)}.{absent}"
    if fastest is control or times < FASTER:
        others = "no other mode that is as good trains faster here"
        if len(modes) == 1:
            others = "no other mode came to its end"
        elif _unknown(modes, control):
            others = "of faster modes nobody measured whether they equal it (check=true does)"
        return f"Take {control.name}: {others} ({title} {score_of(control)}).{absent}"
    why = _why(fastest, control, title)
    share = "" if fastest.efficiency is None else f", {fastest.efficiency:.0%} of ideal"
    many = f" on {fastest.processes} processes" if (fastest.processes or 1) > 1 else ""
    if many and fastest.threads != control.threads:
        whose = "one device" if one else control.name
        many += f" of {fastest.threads} CPU threads ({whose}: {control.threads})"
    return f"Take {fastest.name}: {times:.2f} times as fast{many}{share}, and {why}.{absent}"


def _times(row: Row, control: Row) -> float:
    return (row.images_per_s or 0.0) / (control.images_per_s or math.inf)


def _better(modes: Sequence[Row], control: Row) -> list[Row]:
    found = [row for row in modes if row.word == "better" and not alike(row, control)]
    return [row for row in found if not _little((control, row))]


def _unknown(modes: Sequence[Row], control: Row) -> bool:
    """Tell whether a faster mode may be as good, and its exactness was not asked for."""
    faster = FASTER * (control.images_per_s or math.inf)
    return any(
        row.exactness == NOT_MEASURED
        and (row.images_per_s or 0.0) > faster
        and not row.reasons
        and not row.rounds
        and (row.keys, row.samples) == (control.keys, control.samples)
        for row in modes
    )


def _why(row: Row, control: Row, title: str) -> str:
    if alike(row, control):
        steps = f" over {row.check_steps} steps" if row.check_steps else ""
        return f"it trains exactly as one device does{steps} ({title} {score_of(row)})"
    near = f"not more than {ERROR} from {control.name}'s" if row.word != "better" else "better"
    return f"its {title} of {score_of(row)} is {near} (difference {row.difference:+.3f})"


def score_of(row: Row) -> str:
    """Write a row's main score with its spread."""
    if row.score is None:
        return "-"
    return f"{row.score:.3f}" + (f" ± {row.spread:.3f}" if row.spread is not None else "")


def _noise(modes: Sequence[Row], control: Row) -> str:
    if control.score is not None and _little(modes):
        return (
            f"After so short a training ({control.score:.3f}) scores say little about the modes; "
            "speed, memory and exactness do."
        )
    if not control.spread:
        if all(alike(row, control) for row in modes):
            return ""
        seeds = "With one seed" if control.spread is None else "With seeds that all score the same"
        return (
            f"{seeds} nobody can tell a difference of scores from chance, so only modes that are "
            f"exact count as equal, with the settings of {control.name}; add seeds=0,1,2."
        )
    within = [row.name for row in modes if row.word == "within noise"]
    if not within:
        return ""
    return f"Within noise of {control.name} ({len(control.seeds)} seeds): {', '.join(within)}."


def _memory(modes: Sequence[Row], control: Row) -> list[str]:
    exact = [row for row in modes if row.strategy["kind"] in APART and alike(row, control)]
    known = [row for row in exact if row.peak_rss_mb]
    least = min(known, key=lambda row: row.peak_rss_mb or 0.0, default=control)
    if least is control or not control.peak_rss_mb or not least.peak_rss_mb:
        return []
    share = least.peak_rss_mb / control.peak_rss_mb
    if share > SMALLER:
        return []
    return [
        f"If memory is short, {least.name} is the exact mode that needs least: "
        f"{least.peak_rss_mb:,.0f} MiB in its largest process, {share:.0%} of {control.name}."
    ]


def _federated(row: Row, done: Sequence[Row], control: Row, title: str) -> str:
    """Place a federated run between what its clients reach alone and all data in one place."""
    alone = next((other for other in done if other.name == row.alone), None)
    where = f"{row.name} reaches {title} {score_of(row)} without moving any image"
    if row.score is None or control.score is None or _little((control, row)):
        return ""
    shared = control.rounds or control.strategy["kind"] == "client"
    central = "" if shared else f"all images in one place give {score_of(control)}"
    if alone is None or alone.score is None:
        return f"{where}; {central}." if central else ""
    gain = "more than" if row.score > alone.score else "not more than"
    bound = noise_of(control, row, alone)
    if bound is None:
        gain += ", by one seed," if control.spread is None else ", by seeds that score the same,"
    elif abs(row.score - alone.score) <= bound:
        gain = "within noise of"
    whole = f", while {central}" if central else ""
    return f"{where}: {gain} the best client alone ({score_of(alone)}){whole}."


def _worse(modes: Sequence[Row], control: Row, title: str) -> list[str]:
    if _little(modes):
        return []
    worse = [row for row in modes if row.word == "worse" and not row.rounds]
    return [
        f"{row.name} is worse: {title} {row.difference:+.3f}, more than {ERROR} ({row.noise:.3f})."
        for row in worse
        if not alike(row, control)
    ]
