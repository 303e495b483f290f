"""Parts of a comparison's page: time, exactness, faults, clients, classes, pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from visiontrain.report.bars import bars, legend
from visiontrain.report.draw import colour_of
from visiontrain.report.page import Content, sortable, table, tag
from visiontrain.report.rows import LOST, SPLIT, Row, Trial
from visiontrain.report.run_report import duration, show
from visiontrain.report.side_by_side import Sample

DASH = "\N{EN DASH}"  # where there is no number
PER_CLASS = ("map", "f1", "recall")  # of metrics.json's per_class: the first that there is
TIMES = dict(zip(SPLIT, ("c0", "c5", "c7", "c4", "c1", "c3", "c9", "c2", "c8"), strict=True))

Cell = tuple[Content, float | None]  # what is shown, and what it is sorted by


def cell_of(value: float | None, style: str) -> Cell:
    """Write a number, if there is one."""
    if value is None or math.isnan(value):
        return DASH, None
    return format(value, style), value


# -- where time went --------------------------------------------------------------------


def times(every: Sequence[Row]) -> Content:
    """Show what every run's time went into, as far as its mode measures it."""
    rows = [row for row in every if row.split]
    if not rows:
        return None
    longest = max(sum(row.split.values()) for row in rows)
    drawn = [
        (
            row.name,
            duration(sum(row.split.values())),
            [
                (seconds / longest, TIMES[key], f"{SPLIT[key]}: {seconds:.1f} s")
                for key, seconds in row.split.items()
            ],
        )
        for row in rows
    ]
    used = [key for key in SPLIT if any(row.split.get(key) for row in rows)]
    head = ["mode", *(SPLIT[key] for key in used)]
    cells = [[row.name, *(cell_of(row.split.get(key), ".1f") for key in used)] for row in rows]
    started = any("starting" in row.split for row in rows)
    return [
        tag("h2", "What the time went into"),
        bars(drawn),
        legend([(TIMES[key], SPLIT[key]) for key in used]),
        tag(
            "details",
            [
                tag("summary", "in seconds"),
                sortable(head, cells, range(1, len(head))),
                tag(
                    "p",
                    "A dash: this mode does not measure it, or has none of it."
                    + (" Starting is known of runs that nothing interrupted." if started else ""),
                    {"class": "soft"},
                ),
            ],
        ),
    ]


# -- exactness and faults -----------------------------------------------------------------


def exactness(every: Sequence[Row]) -> Content:
    """Show how near each mode is to one device."""
    rows = [row for row in every if row.seeds]
    if not rows:
        return None
    cells = [(row.name, [tag("div", line) for line in _exactness_of(row)]) for row in rows]
    steps = next((row.check_steps for row in rows if row.check_steps), None)
    over = f" over {steps} optimizer steps" if steps else ""
    text = (
        f"Each mode beside one device{over} in 64-bit floats, as visiontrain parity measures it; "
        "final weights are not compared, since rounding alone drives them apart."
    )
    return [tag("h2", "Exactness"), tag("p", text), table(("mode", ""), cells, [])]


def _exactness_of(row: Row) -> list[Content]:
    gap = f"; weights differ by {row.gap:.1e} at most" if row.gap is not None else ""
    return [[tag("b", row.exactness), gap], *row.reasons]


def faults(every: Sequence[Row]) -> Content:
    """Show what only some modes have: staleness, rounds, lost work, memory of each process."""
    facts = [(row.name, _facts_of(row)) for row in every]
    rows = [(name, [tag("div", fact) for fact in found]) for name, found in facts if found]
    if not rows:
        return None
    return [tag("h2", "Faults, staleness, memory"), table(("mode", ""), rows, [])]


def _facts_of(row: Row) -> list[str]:
    counts = {key: count for key, count in row.lost.items() if count}
    dropped = counts.pop("dropped", 0)  # some rules drop what is late: no fault
    lost = [f"{count:,} {LOST[key]}" for key, count in counts.items()]
    many = " in all seeds" if len(row.trials) > 1 else ""
    found = [f"lost to faults{many}: {', '.join(lost) or 'nothing'}"] if row.lost else []
    if dropped:
        found.append(f"{dropped:,} {LOST['dropped']}{many}, their images were handed out again")
    if row.staleness is not None:
        ages = _ages(row.trials)
        found.append(f"updates between reading and applying: {row.staleness:.2f} ({ages})")
    if row.rounds:
        found.append(f"{row.rounds:,} rounds")
    if row.bytes_received is not None:
        found.append(f"clients sent {row.bytes_received / 1e6:,.1f} MB")
    if len(row.peaks_rss_mb) > 1:
        peaks = ", ".join(f"{peak:,.0f}" for peak in row.peaks_rss_mb)
        servers = row.strategy["kind"] == "parameter_server"
        whose = "the main process and the largest worker, without servers"
        found.append(f"memory of {whose if servers else 'each process'}: {peaks} MiB")
    return found


def _ages(trials: Sequence[Trial]) -> str:
    counts: dict[int, int] = {}
    for trial in trials:
        for age, updates in trial.stalenesses.items():
            counts[int(age)] = counts.get(int(age), 0) + updates
    whole = sum(counts.values())
    shares = (f"{age} of {counts[age] / whole:.0%}" for age in sorted(counts) if whole)
    return ", ".join(shares)


# -- clients ------------------------------------------------------------------------------


def clients(every: Sequence[Row]) -> Content:
    """Show which images clients of federated runs have, and how they are served."""
    parts = [_partition(row, names_of(every)) for row in every]
    parts = [part for part in parts if part]
    return [tag("h2", "Who has which images"), *parts] if parts else None


def names_of(every: Sequence[Row]) -> list[str]:
    """Return the classes, in the order of their numbers, as the first run names them."""
    for row in every:
        for trial in row.trials:
            if trial.per_class:
                return list(trial.per_class)
    return []


def _partition(row: Row, names: Sequence[str]) -> Content:
    trial = next((trial for trial in row.trials if trial.clients), None)
    if trial is None:
        return None
    clients = trial.clients
    most = max(client["images"] for client in clients.values()) or 1
    drawn = []
    for number, client in clients.items():
        counts = client.get("classes") or []
        spans = [
            (count / most, f"rgb{colour_of(label)}", f"{_class(names, label)}: {count:,} images")
            for label, count in enumerate(counts)
            if count
        ] or [(client["images"] / most, "c0", f"{client['images']:,} images")]
        scores = [
            f"{meaning} {client[key]:.3f}"
            for key, meaning in (("common_score", "common"), ("own_score", "own"))
            if client.get(key) is not None
        ]
        drawn.append(
            (f"client {number}", "; ".join([f"{client['images']:,} images", *scores]), spans)
        )
    spread = [] if trial.client_spread is None else [_spread(trial)]
    seed = f", seed {trial.seed}" if len(row.trials) > 1 else ""  # each deals images anew
    held = range(len(names) + 1)
    used = [k for k in held if any(_count(client, k) for client in clients.values())]
    return [
        tag("h3", f"{row.name}{seed}"),
        bars(drawn),
        legend([(f"rgb{colour_of(k)}", _class(names, k)) for k in used]) if names else None,
        *(tag("p", text) for text in spread),
    ]


def _count(client: Mapping[str, Any], label: int) -> int:
    counts = client.get("classes") or []
    return counts[label] if label < len(counts) else 0


def _class(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else "no label"


def _spread(trial: Trial) -> str:
    return (
        f"The common weights score {show(trial.worst_client)} on the images of the client that "
        f"they serve worst; the standard deviation over clients is {show(trial.client_spread)}. "
        "Common: "
        "of the common weights; own: of what a client had made of them last, before all met."
    )


# -- classes and pictures -------------------------------------------------------------------


def classes(every: Sequence[Row]) -> Content:
    """Show every class's score in every mode."""
    rows = [row for row in every if any(trial.per_class for trial in row.trials)]
    names = names_of(every)
    if not rows or not names:
        return None
    each = rows[0].trials[0].per_class or next(t.per_class for t in rows[0].trials if t.per_class)
    key = next((k for k in PER_CLASS if k in each[names[0]]), None)
    if key is None:
        return None
    title = {"map": "average precision", "f1": "F1", "recall": "recall"}[key]
    cells = [[name, *(cell_of(_of_class(row, name, key), ".3f") for row in rows)] for name in names]
    return [
        tag("h2", f"Classes: {title}"),
        sortable(["class", *(row.name for row in rows)], cells, range(1, len(rows) + 1)),
    ]


def _of_class(row: Row, name: str, key: str) -> float | None:
    values = [trial.per_class.get(name, {}).get(key) for trial in row.trials]
    known = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
    return sum(known) / len(known) if known else None


def shown_samples(samples: Sequence[Sample]) -> Content:
    """Show pictures as each mode sees them."""
    if not samples:
        return None
    strips = []
    for sample in samples:
        figures = [
            tag(
                "figure",
                [
                    tag("img", attributes={"src": shot.url, "alt": f"{shot.mode}: {shot.text}"})
                    if shot.url
                    else None,
                    tag("figcaption", [tag("b", shot.mode), f" {shot.text}"]),
                ],
            )
            for shot in sample.shots
        ]
        strips.append(
            [tag("p", sample.title, {"class": "soft"}), tag("div", figures, {"class": "strip"})]
        )
    return [tag("h2", "The same pictures, seen by each mode"), *strips]
