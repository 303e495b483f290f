"""check.html: what is in a data set and what is wrong with it, on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from visiontrain.core.durable import replace_file, storing
from visiontrain.data.check import NEEDED, Report, SplitReport
from visiontrain.data.defects import DEFECTS, counted, describe
from visiontrain.report.check_plots import classes_plot, labels_picture, sizes_plot, twins_picture
from visiontrain.report.page import Content, Html, page, table, tag
from visiontrain.report.plots import label_plot
from visiontrain.report.run_report import figure_of, show

LISTED, OPEN = 20, 3  # defects of one kind on the page, and kinds that are unfolded
HARM = ("stops", "image dropped", "box dropped", "clipped", "doubtful", "none")  # worst first


def write_check(report: Report, folder: Path) -> Path:
    """Write `folder`/check.html: one file that loads nothing and runs no script.

    Returns:
        The path of the page.
    """
    with TemporaryDirectory() as scratch:
        pictures = _pictures(report, Path(scratch))
    body = [
        tag("h1", f"{report.source}: is it ready to train on?"),
        _verdict(report),
        _cards(report),
        _advice(report),
        pictures,
        _splits(report),
        _defects(report),
        tag("p", "Made by visiontrain check.", {"class": "soft"}),
    ]
    path = folder / "check.html"
    with storing(path):
        folder.mkdir(parents=True, exist_ok=True)
        text = page(f"{report.source}: check", body)
        replace_file(path, text.encode("utf-8", errors="replace"))
    return path


def _verdict(report: Report) -> Content:
    lines = [f"{split}: no such split, and a run needs it; {how}" for split, how in report.missing]
    lines += [f"{s.split}: not read: {s.problem}" for s in report.splits if s.problem]
    lines += [
        f"{s.split}: nothing to use"
        for s in report.splits
        if s.split in NEEDED and not s.problem and not s.usable
    ]
    if report.failed:
        return [tag("p", f"Not as it is. {line}", {"class": "note"}) for line in lines]
    across = len(report.pairs)
    verb = "is" if across == 1 else "are"
    but = f" But {counted(across, 'picture')} {verb} in two splits: scores flatter."
    but = but if across else ""
    return tag("p", f"Yes: a run would start on it.{but}")


def _cards(report: Report) -> Content:
    read = [split for split in report.splits if split.problem is None]
    noun = read[0].noun if read else "label"
    numbers = (
        ("images", sum(split.images for split in read)),
        ("boxes" if noun == "box" else "labels", sum(split.boxes for split in read)),
        ("classes", len(report.names)),
        ("most : least frequent class", report.balance.ratio),
        ("pictures in two splits", len(report.pairs)),
        ("defects", sum(len(split.defects) for split in read)),
    )
    cards = [
        tag("div", [tag("b", _number(value)), name], {"class": "card"}) for name, value in numbers
    ]
    return tag("div", cards, {"class": "cards"})


def _number(value: float | None) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else show(value)


def _advice(report: Report) -> Content:
    lines = [*report.advice, *report.notes]
    return [tag("p", line, {"class": "note"}) for line in lines]


def _pictures(report: Report, scratch: Path) -> Content:
    tables = {split: table for split, table in report.tables.items() if len(table)}
    if not tables:
        return None
    first = next(iter(tables))
    detect = tables[first].task == "detect"
    plots: list[tuple[str, str, Callable[[Path], Path]]] = [
        (
            "Classes",
            "How the labels of each split are spread over classes; numbers are labels.",
            lambda path: classes_plot(tables, path),
        )
    ]
    if report.pairs:
        many = len(report.pairs)
        said = f"Of {counted(many, 'picture')} in two splits: each beside its twin, nearest first."
        plots.append(
            ("In two splits", said, lambda path: twins_picture(tables, report.pairs, path))
        )
    said = "Dots are as large as the images of their size are many."
    plots.append(("Sizes", said, lambda path: sizes_plot(tables, report.imgsz, path)))
    if detect:
        said = f"What the labels of {first} hold, where they lie, how large they are."
        plots.append(("Places", said, lambda path: label_plot(tables[first], path)))
    said = f"Pictures of {first} at even distances, with their labels."
    plots.append(("Labels", said, lambda path: labels_picture(tables[first], path)))
    return [
        [tag("h2", title), figure_of(draw(scratch / f"{title}.png"), caption)]
        for title, caption, draw in plots
    ]


def _splits(report: Report) -> Content:
    read = [split for split in report.splits if split.problem is None]
    if not read:
        return None
    noun = "Boxes" if read[0].noun == "box" else "Labels"
    head = (
        "Split",
        "Images",
        noun,
        f"Without {noun.lower()}",
        "In an earlier split",
        "Again in it",
    )
    rows = [
        [
            split.split,
            *map(
                show,
                (
                    split.images,
                    split.boxes,
                    split.backgrounds,
                    split.duplicates + split.near_duplicates,
                    split.repeated,
                ),
            ),
        ]
        for split in read
    ]
    return [tag("h2", "Splits"), table(head, rows, range(1, 6)), _boxes(report, read)]


def _boxes(report: Report, read: list[SplitReport]) -> Content:
    head = ("Boxes of", "Small", "Medium", "Large", f"Below 8 px at {report.imgsz}", "Longest")
    rows = [
        [
            split.split,
            *map(show, (own.small, own.medium, own.large, own.tiny_at_imgsz)),
            f"{own.most_thin:.1f} : 1",
        ]
        for split in read
        for own in [split.box_sizes]
        if own is not None
    ]
    said = "Small: below 32² pixels of the original; large: above 96², as COCO counts."
    return [table(head, rows, range(1, 6)), tag("p", said, {"class": "soft"})] if rows else None


def _defects(report: Report) -> Content:
    """List defects, those that lose most first."""
    sections: list[Content] = []
    for split in report.splits:
        kinds = Counter(defect.kind for defect in split.defects)
        for kind in sorted(kinds, key=lambda kind: (HARM.index(DEFECTS[kind][0]), kind)):
            done, meaning = DEFECTS[kind]
            found = [describe(defect) for defect in split.defects if defect.kind == kind]
            more = f"\n... and {len(found) - LISTED} more" if len(found) > LISTED else ""
            head = f"{split.split}: {kinds[kind]:,} {kind}"
            head += f" ({done})" if done != "none" else ""
            sections.append(
                tag(
                    "details",
                    [
                        tag("summary", [tag("b", head), Html(" "), meaning]),
                        tag("pre", "\n".join(found[:LISTED]) + more),
                    ],
                    {"open": ""} if len(sections) < OPEN else None,
                )
            )
    return [tag("h2", "Defects"), sections or tag("p", "None was found.")]
