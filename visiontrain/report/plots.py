"""The plots of a run: results over epochs, curves over confidence, confusion, labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.data.defects import counted
from visiontrain.data.table import Table
from visiontrain.loggers.csv import read_rows
from visiontrain.metrics.curves import CONFIDENCES, RECALLS, Curves, confusion_matrix, curves
from visiontrain.report.confusion import confusion_plot
from visiontrain.report.figure import (
    FAINT,
    INK,
    STRONG,
    name_lines,
    new_figure,
    save,
    short,
    sign,
    style,
)
from visiontrain.report.pictures import CONFIDENCE, predictions_picture

Floats = NDArray[np.floating]
MANY = 12  # classes from which on a curve for each is too much to tell apart
BEST, HALF = "At the best confidence", "At a score of a half"
PANELS = (  # of results.png, after the losses; a panel without values is left out
    ("Average precision", ("val/map", "val/map50", "val/map75")),
    ("Accuracy", ("val/top1", "val/top5", "val/balanced")),
    ("Loss on the scored images", ("val/loss",)),
    ("Calibration error", ("val/ece",)),
    (BEST, ("val/precision", "val/recall", "val/f1")),
    ("mAP50-95 by size of box", ("val/map_small", "val/map_medium", "val/map_large")),
    ("Learning rate", ("lr",)),
    ("Images per second", ("images_per_s",)),
    ("Share of time waiting for data", ("data_wait",)),
    ("Updates per second", ("updates_per_s",)),
    ("Updates between reading and applying", ("staleness",)),
    ("Share of workers' time", ("wait", "exchange")),
)


NAMES = {  # of lines in results.png, where they differ from the columns of results.csv
    "top1": "top-1",
    "top5": "top-5",
    "balanced": "mean of classes",
    "map": "mAP50-95",
    "map50": "mAP50",
    "map75": "mAP75",
    "map_small": "small",
    "map_medium": "medium",
    "map_large": "large",
    "f1": "F1",
    "o2m": "one-to-many head",
    "o2o": "one-to-one head",
    "all": "all heads",
    "wait": "waiting for others",
    "exchange": "reading and pushing",
}
OVERLAP = 0.45  # of a detection and a box, from which a confusion matrix counts them as a pair


def results_plot(results: Path, path: Path) -> Path:
    """Draw results.csv over epochs to `path`: losses, scores, learning rate, speed."""
    rows = read_rows(results)
    epochs = [float(row["epoch"]) for row in rows]
    found = [(title, keys) for title, keys in _panels(rows) if keys]
    columns = min(3, max(1, len(found)))
    lines = max(1, math.ceil(len(found) / columns))
    figure = new_figure(4.6 * columns, 3.4 * lines)
    if not found:
        figure.text(0.5, 0.5, "no epoch is over yet", ha="center", fontsize=12, color=INK)
    for number, (title, keys) in enumerate(found):
        axes = style(figure.add_subplot(lines, columns, number + 1), title, "epoch", pad=22)
        columns_of = [_column(rows, key) for key in keys]
        drawn = [_over_epochs(axes, epochs, values, n) for n, values in enumerate(columns_of)]
        # Of one or two epochs, too, only whole ones.
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        if not title.startswith("Training"):
            top = float(np.nanmax(np.where(np.isfinite(columns_of), columns_of, 0)))
            margin = 0.05 * (top or 1)  # a line along an edge is as thick as any
            axes.set_ylim(-margin, (top or 1) + margin)
        if len(keys) > 1:
            name_lines(axes, drawn, _own_parts(keys))
    return save(figure, path)


def _panels(rows: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Sort the columns that have a finite value into panels: each loss term, then PANELS."""
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if np.isfinite(_column(rows, key)).any()
    ]
    terms: dict[str, list[str]] = {}
    for key in keys:
        if key.startswith("train/"):
            terms.setdefault(key.split("/")[-1], []).append(key)
    losses = [(f"Training loss: {term}", group) for term, group in terms.items()]
    panels = dict(PANELS)
    if "val/map" in keys and "val/map50" not in keys:  # of images with several classes
        panels = {HALF if title == BEST else title: group for title, group in PANELS}
    return losses + [(title, [k for k in group if k in keys]) for title, group in panels.items()]


def _column(rows: Sequence[Mapping[str, str]], key: str) -> Floats:
    return np.array([_number(row.get(key, "")) for row in rows])


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _own_parts(keys: Sequence[str]) -> list[str]:
    """Return what tells keys apart, for people: the heads of train/o2m/box and train/o2o/box."""
    losses = keys[0].startswith("train/")
    parts = [key.split("/")[1] if losses else key.removeprefix("val/") for key in keys]
    return [NAMES.get(part, part) for part in parts]


def _over_epochs(axes: Axes, epochs: Sequence[float], values: Floats, number: int) -> Line2D:
    colour, dashes = sign(number)
    marker = "o" if len(epochs) < 20 else ""
    (line,) = axes.plot(
        epochs, values, dashes, color=colour, marker=marker, markersize=4, linewidth=1.8
    )
    return line


def scored_plots(table: Table, rows: Tensor, folder: Path) -> list[Path]:
    """Draw all that detections (K, 7) of a split show: curves, confusion, pictures."""
    matrix = confusion_matrix(table, rows, confidence=CONFIDENCE, overlap=OVERLAP)
    names, note = [*table.names, "background"], f"confidence above {CONFIDENCE}, IoU from {OVERLAP}"
    shares = folder / "confusion_matrix_normalized.png"
    return [
        *curve_plots(curves(table, rows), folder),
        confusion_plot(matrix, names, folder / "confusion_matrix.png", note),
        confusion_plot(matrix, names, shares, note, normalized=True),
        predictions_picture(table, rows, folder / "val_predictions.png"),
    ]


@dataclass(frozen=True, slots=True)
class Legend:
    """What stands beside a plot of curves."""

    title: str
    note: Callable[[Floats], str]  # after a name: what the line's values (X,) come to
    rank: Floats  # (C,): which classes are the best and the worst, where there are many
    ends: tuple[str, str] = ("best", "worst")


def curve_plots(found: Curves, folder: Path) -> list[Path]:
    """Draw precision by recall, and F1, precision and recall by confidence, into `folder`."""
    ap = Legend("AP at overlap 0.5", lambda values: f"  {values.mean():.3f}", found.ap)
    highest = Legend("highest F1", _highest, found.f1.max(axis=1))
    plain = Legend("class", lambda _: "", found.ap, ("best AP", "worst AP"))
    plots = (
        ("pr", "Precision", "recall", found.precision_at_recall, ap),
        ("f1", "F1", "confidence", found.f1, highest),
        ("precision", "Precision", "confidence", precision_left(found), plain),
        ("recall", "Recall", "confidence", found.recall, plain),
    )
    paths = []
    for name, what, by, values, legend in plots:
        figure = new_figure(9, 5.4)
        label = "F1" if name == "f1" else what.lower()
        axes = style(figure.add_subplot(), f"{what} by {by}", by, label)
        _curves(axes, found, RECALLS if by == "recall" else CONFIDENCES, values, legend)
        if name == "f1" and found.best is not None:
            _mark(axes, found.best, float(np.nanmean(found.f1[:, found.best])))
        paths.append(save(figure, folder / f"{name}_curve.png"))
    return paths


def precision_left(found: Curves) -> Floats:
    """Return precision by confidence (C, T), 1 where no detection of a class is left.

    That is the end of scikit-learn's precision-recall curve, and what YOLO tools draw: what is not
    said is not wrong. So every class counts in the mean at every confidence. A class without any
    detection at all stays at 0.
    """
    gone = (found.predicted == 0) & (found.predicted[:, :1] > 0)
    return np.where(gone, 1.0, found.precision)


def _highest(values: Floats) -> str:
    """Write the highest of values by confidence (T,) and where it is; of a plateau, its middle."""
    places = np.flatnonzero(values == values.max())
    place = places[len(places) // 2]
    where = f" at {CONFIDENCES[place]:.2f}" if values[place] else ""
    return f"  {values[place]:.3f}{where}"


def _curves(axes: Axes, found: Curves, x: Floats, values: Floats, legend: Legend) -> None:
    """Draw one line per class with a box, and their mean."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    known = np.flatnonzero(found.boxes > 0)
    if not len(known):
        axes.text(0.5, 0.5, "no class has a box", ha="center", fontsize=12, color=INK)
        return
    mean = values[known].mean(axis=0)
    (line,) = axes.plot(x, mean, color=STRONG, linewidth=3, zorder=4)
    name = f"mean of {len(known)}" if len(known) > 1 else short(found.names[known[0]])
    named = [(line, f"{name}{legend.note(mean)}")]
    if 1 < len(known) <= MANY:
        for number, label in enumerate(known, start=1):
            colour, dashes = sign(number)
            (line,) = axes.plot(x, values[label], dashes, color=colour, linewidth=1.4)
            named.append((line, f"{short(found.names[label])}{legend.note(values[label])}"))
    elif len(known) > MANY:
        axes.plot(x, values[known].T, color=FAINT, linewidth=0.7)
        order = known[np.argsort(-legend.rank[known], kind="stable")].tolist()
        best, worst = legend.ends
        ends = [(best, label) for label in order[:3]] + [(worst, n) for n in order[-3:]]
        for number, (end, label) in enumerate(ends, start=1):
            (line,) = axes.plot(x, values[label], color=sign(number)[0], linewidth=1.6)
            name = short(found.names[label])
            named.append((line, f"{end}: {name}{legend.note(values[label])}"))
    lines, names = zip(*named, strict=True)
    name_lines(axes, lines, names, legend.title)


def _mark(axes: Axes, best: int, height: float) -> None:
    """Mark the confidence to use."""
    x = CONFIDENCES[best]
    axes.axvline(x, color=INK, linewidth=1, linestyle=":")
    side, shift = ("left", 6) if x < 0.6 else ("right", -6)
    axes.annotate(
        f"best mean F1 {height:.3f} at {x:.3f}",
        (x, 0.03),
        (shift, 0),
        textcoords="offset points",
        fontsize=9,
        color=INK,
        ha=side,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        zorder=5,  # above all curves
    )


def label_plot(table: Table, path: Path, title: str = "") -> Path:
    """Draw what `table` holds to `path`: boxes per class and image, where, and how large."""
    keep = ~(table.crowd | table.difficult)
    counts = np.bincount(table.classes[keep], minlength=len(table.names))
    shown = min(len(counts), 60)
    figure = new_figure(11, float(np.clip(3.4 + 0.1 * shown, 6.4, 9.4)))
    grid = figure.add_gridspec(2, 3)
    head = f"{counted(int(keep.sum()), 'box')} in {counted(len(table), 'image')}"
    head += title and f": {title}"
    axes = style(figure.add_subplot(grid[:, 0]), head, "boxes")
    class_bars(axes, table.names, counts, shown)
    sizes = np.repeat(table.sizes, np.diff(table.offsets), axis=0)[keep].astype(np.float64)
    boxes = table.boxes[keep].astype(np.float64)
    middle, extent = (
        (boxes[:, :2] + boxes[:, 2:]) / 2 / sizes,
        (boxes[:, 2:] - boxes[:, :2]) / sizes,
    )
    axes = style(figure.add_subplot(grid[0, 1]), "Box centres", "x / width", "y / height")
    _density(axes, middle)
    axes.invert_yaxis()  # as in the image: y runs down
    axes = style(figure.add_subplot(grid[0, 2]), "Box sizes", "width", "height")
    _density(axes, extent)
    axes = style(figure.add_subplot(grid[1, 1]), "Boxes per image", "boxes", "images")
    owner = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    each = np.bincount(owner[keep], minlength=len(table))
    axes.hist(each, bins=_whole_bins(each), color=STRONG)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes = style(figure.add_subplot(grid[1, 2]), "Box side, share of image side", "√area", "boxes")
    axes.hist(np.sqrt(extent.prod(axis=1)), bins=np.linspace(0, 1, 41).tolist(), color=STRONG)
    return save(figure, path)


def class_bars(
    axes: Axes, names: Sequence[str], counts: NDArray[np.int64], shown: int, what: str = "boxes"
) -> None:
    """Draw a bar per class in the order of the classes; of too many, the most common."""
    order = np.arange(len(counts))
    if shown < len(counts):
        order = np.argsort(-counts, kind="stable")[:shown]
        axes.set_xlabel(f"{what} (the {shown} most common of {len(counts)} classes)")
    thick = 0.8 * min(1, shown / 6)  # a few bars aren't blocks
    bars = axes.barh(np.arange(shown), counts[order], thick, color=STRONG)
    axes.bar_label(bars, [f"{count:,}" for count in counts[order]], padding=3, fontsize=8)
    font = 10 if shown <= 20 else 8
    axes.set_yticks(np.arange(shown), [short(names[n], 18) for n in order.tolist()], fontsize=font)
    axes.set_ylim(shown - 0.5, -0.5)
    axes.margins(x=0.16)
    axes.grid(visible=False, axis="y")


def _density(axes: Axes, points: Floats) -> None:
    """Draw how many points (K, 2), as shares of the image, lie where."""
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_aspect("equal")
    if len(points):
        axes.hist2d(
            points[:, 0],
            points[:, 1],
            bins=int(np.clip(len(points) ** 0.5 / 2, 10, 60)),
            range=[[0, 1], [0, 1]],
            cmin=1,
            norm=LogNorm(vmin=0.3),  # one point is to be seen
            cmap=matplotlib.colormaps["Blues"],
        )


def _whole_bins(values: NDArray[np.int64]) -> list[float]:
    """Return at most 40 bins of whole width around the integers `values`."""
    top = int(values.max(initial=0))
    step = max(1, math.ceil((top + 1) / 40))
    return [start - 0.5 for start in range(0, top + 1 + step, step)]
