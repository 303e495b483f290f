"""report.html of a comparison: what to take, in words, and everything that says so."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visiontrain.core.durable import replace_file, storing
from visiontrain.report import extrapolated
from visiontrain.report.compare import Comparison
from visiontrain.report.compare_sections import (
    DASH,
    Cell,
    cell_of,
    classes,
    clients,
    exactness,
    faults,
    shown_samples,
    times,
)
from visiontrain.report.figure import DASHES, PALETTE
from visiontrain.report.page import Content, Extras, Html, page, sortable, table, tag
from visiontrain.report.rows import SCORES, Row
from visiontrain.report.run_report import duration
from visiontrain.report.side_by_side import Sample

AXES = ("images seen", "seconds of training, scoring and saving", "MB sent")
PARITY_STEPS = 20  # that visiontrain parity compares
AXIS_NAMES = ("by samples", "by time", "by bytes")
HERE = Path(__file__).parent


def write_page(found: Comparison, samples: Sequence[Sample] = ()) -> Path:
    """Write `folder`/report.html: one file that loads nothing and sends nothing.

    Args:
        found: the comparison.
        samples: pictures with what each mode finds on them.

    Returns:
        The path of the page.

    Raises:
        StorageError: when it cannot be written.
    """
    rows = found.rows
    body = [
        *(section(found) for section in (_headline, _table, _curves)),
        *(section(rows) for section in (times, exactness, faults, clients, classes)),
        extrapolated.section(found.predicted),
        shown_samples(samples),
        _repeat(found),
        _facts(found),
    ]
    extras = Extras(
        style=(HERE / "compare.css").read_text(encoding="utf-8"),
        script=(HERE / "compare.js").read_text(encoding="utf-8"),
        data={"curves": curves(found)},
    )
    path = found.folder / "report.html"
    with storing(path):
        text = page(f"{found.title}: modes compared", body, extras)
        replace_file(path, text.encode("utf-8", errors="replace"))
    return path


def main_title(found: Comparison) -> str:
    """Return the name of the main score."""
    return next(iter(SCORES[found.task].values()))


# -- what to take -----------------------------------------------------------------------


def _headline(found: Comparison) -> Content:
    answer, *more = found.verdict()
    left = found.planned - len(found.rows)
    return [
        tag("h1", f"{len(found.rows)} runs compared: {found.title}"),
        tag("p", answer, {"class": "answer"}),
        tag("ul", [tag("li", sentence) for sentence in more]) if more else None,
        tag("p", f"Stopped: {left} rows are still to come.", {"class": "note"}) if left else None,
    ]


def _table(found: Comparison) -> Content:
    titles = SCORES[found.task]
    many = any(len(row.trials) > 1 for row in found.rows)
    head = ["mode", "class", "W\N{MULTIPLICATION SIGN}T", *titles.values(), "difference"]
    head += ["noise"] if many else []
    head += [
        "time",
        "images/\N{WORD JOINER}s",
        "speed\N{NON-BREAKING HYPHEN}up",
        "efficiency",
        "MB sent",
        "MiB of memory",
    ]
    rows = [_line(row, list(titles), many=many) for row in found.rows]
    text = {"mode", "class", "noise"}
    numbers = [column for column, title in enumerate(head) if title not in text]
    return [
        tag("h2", "All runs"),
        sortable(head, rows, numbers),
        tag("p", _meaning(found, many=many), {"class": "soft"}),
    ]


def _line(row: Row, scores: Sequence[str], *, many: bool) -> list[Cell | str]:
    if row.error and not row.seeds:
        empty: list[Cell | str] = [(DASH, None)] * (len(scores) + 8 + many)
        return [row.name, "failed", *empty]
    main = scores[0]
    exactness = row.exactness.removesuffix(" algorithm") + (", a seed failed" if row.error else "")
    cells: list[Cell | str] = [row.name, exactness, _size(row)]
    for name in scores:
        text, value = cell_of(row.scores.get(name), ".3f")
        spread = f" ± {row.spread:.3f}" if row.spread is not None and name == main else ""
        cells.append((f"{text}{spread}", value))
    cells.append(cell_of(row.difference, "+.3f"))
    if many:
        cells.append(_noise(row))
    cells += [
        (DASH if row.seconds is None else duration(row.seconds), row.seconds),
        cell_of(row.images_per_s, ",.1f"),
        cell_of(row.speedup, ".2f"),
        cell_of(row.efficiency, ".0%"),
        cell_of(None if row.bytes_sent is None else row.bytes_sent / 1e6, ",.1f"),
        cell_of(row.peak_rss_mb, ",.0f"),
    ]
    return cells


def _size(row: Row) -> Cell:
    """Say how many processes it has, and how many threads each of them."""
    if row.processes is None:
        return DASH, None
    return f"{row.processes}\N{MULTIPLICATION SIGN}{row.threads}", row.processes


def _noise(row: Row) -> Cell:
    """Tell whether a difference is larger than the noise, and what that is."""
    if row.word is None or row.noise is None:
        return row.word or DASH, None
    return f"{'within' if row.word == 'within noise' else 'beyond'} {row.noise:.3f}", row.noise


def _meaning(found: Comparison, *, many: bool) -> str:
    counts = found.samples()
    alike = "All trained on as many images"
    if len(counts) > 1:
        alike = f"Not all trained on as many images, but on {counts[0]:,} to {counts[-1]:,}"
    budget = {
        "samples": f"{alike} (a client alone: its own, in as many epochs as the federated run)",
        "epochs": "Each trained for the epochs that it was given",
        "seconds": "All trained for as long",
    }[found.budget]
    seeds = ""
    if many:
        seeds = (
            " Scores are means over seeds ± their standard deviation. Noise: a difference counts "
            "when it is larger than 2 s √(1/n + 1/m) of n and m seeds, s the larger deviation of "
            "the control's and its own: more than twice the standard error that these give."
        )
    return (
        f"{budget}; initial weights {found.origin()}.{seeds} "
        "W\N{MULTIPLICATION SIGN}T: processes and CPU threads of each. Speed-up: in images/s of "
        "training, over one device; efficiency: that for each core that it may use (on GPUs: for "
        "each GPU). MB sent: by the main process to others (of parameter servers, per "
        "worker, both ways). Memory: of the largest process that tells "
        "(of federated runs, the server; of parameter servers, the main process or a worker). "
        "Click on a title to sort."
    )


# -- curves -----------------------------------------------------------------------------


def curves(found: Comparison) -> dict[str, Any]:
    """Return what the page's script draws: a line per run, in the colour of its mode."""
    lines = [
        {
            "name": trial.name,
            "mode": number,
            "colour": number % len(PALETTE),
            "dash": number // len(PALETTE) % len(DASHES),
            "points": [
                [point.samples, point.seconds, point.bytes / 1e6, point.score]
                for point in trial.curve
            ],
        }
        for number, row in enumerate(found.rows)
        for trial in row.trials
        if trial.curve
    ]
    return {
        "lines": lines,
        "axes": AXES,
        "score": main_title(found),
        "label": f"{main_title(found)} of each run",
    }


def _curves(found: Comparison) -> Content:
    drawn = [number for number, row in enumerate(found.rows) if any(t.curve for t in row.trials)]
    if not drawn:
        return None
    axes = [
        tag(
            "button",
            name,
            {"type": "button", "data-axis": str(k), "aria-pressed": "false" if k else "true"},
        )
        for k, name in enumerate(AXIS_NAMES)
    ]
    keys = [
        tag(
            "button",
            [tag("span", None, {"class": f"sign {_look(number)}"}), found.rows[number].name],
            {"type": "button", "data-mode": str(number), "aria-pressed": "true"},
        )
        for number in drawn
    ]
    tip = tag("div", None, {"class": "tip", "hidden": "hidden"})
    chart = [
        tag("div", axes, {"class": "keys"}),
        tag("div", tip, {"class": "plot"}),
        tag("div", keys, {"class": "keys"}),
    ]
    note = "This needs scripts, which are switched off; results.csv in each run's folder holds it."
    return [
        tag("h2", f"{main_title(found)} on the way"),
        tag("noscript", tag("p", note, {"class": "note"})),
        tag("div", chart, {"class": "chart", "data-from": "curves"}),
        tag("p", "Point at a curve for its values; click on a name to hide it.", {"class": "soft"}),
    ]


def _look(number: int) -> str:
    return f"c{number % len(PALETTE)} d{number // len(PALETTE) % len(DASHES)}"


# -- how to repeat it -----------------------------------------------------------------------


def commands_of(found: Comparison) -> list[str]:
    """Return what repeats the comparison, each of its runs, and each check of exactness."""
    lines = [f"visiontrain compare {_quoted(found.folder / 'compare.yaml')}"]
    trials = [trial for row in found.rows for trial in row.trials if trial.folder]
    configs = (found.folder / trial.folder / "config.yaml" for trial in trials)
    lines += [f"visiontrain train {_quoted(path)}" for path in configs]
    for row in found.rows:
        if row.gap is not None and row.trials[0].folder and (row.steps or 0) >= PARITY_STEPS:
            path = found.folder / row.trials[0].folder / "config.yaml"
            lines.append(f"visiontrain parity {_quoted(path)}")
    return lines


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _repeat(found: Comparison) -> Content:
    lines = commands_of(found)
    longer = "visiontrain parity takes longer: more steps, and in more precisions than here."
    measured = any(line.startswith("visiontrain parity") for line in lines)
    return [
        tag("h2", "Repeat it"),
        tag("pre", "\n".join(lines)),
        tag("p", longer, {"class": "soft"}) if measured else None,
    ]


def _facts(found: Comparison) -> Content:
    rows = [(key, str(value)) for key, value in found.machine.items()]
    rows += [(f"version of {name}", version) for name, version in found.versions.items()]
    rows.append(("initial weights", found.origin()))
    errors = [
        tag("details", [tag("summary", f"{row.name} failed"), tag("pre", row.error)])
        for row in found.rows
        if row.error
    ]
    return [
        tag("h2", "Errors") if errors else None,
        *errors,
        tag("h2", "Machine"),
        table(("", ""), rows, []),
        tag("p", Html("Made by visiontrain compare."), {"class": "soft"}),
    ]
