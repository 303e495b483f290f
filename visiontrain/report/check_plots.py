"""The plots of a data set that was checked: classes, sizes, places, twins, labels on pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from visiontrain.core.errors import DataError
from visiontrain.data.census import TINY, class_counts, sides_at
from visiontrain.data.looks import Pair
from visiontrain.data.table import Table
from visiontrain.report.figure import INK, name_lines, new_figure, save, short, sign, style
from visiontrain.report.pictures import Picture, grid, readable, save_sheet

CLASSES = 40  # bars that can be read
SHOWN = 12  # pairs of twins, and pictures with labels


def classes_plot(tables: Mapping[str, Table], path: Path) -> Path:
    """Draw the share that each class has of the labels of each split to `path`."""
    counts = [class_counts(table) for table in tables.values()]
    names = next(iter(tables.values())).names
    order = np.argsort(-counts[0], kind="stable")
    if len(order) > CLASSES:  # both ends tell
        order = np.concatenate([order[: CLASSES // 2], order[-CLASSES // 2 :]])
    figure = new_figure(9, float(np.clip(1.6 + 0.16 * len(order) * len(counts), 3, 14)))
    what = f" (the {CLASSES // 2} most and the {CLASSES // 2} least frequent)"
    title = "Share of the labels" + (what if len(order) < len(names) else "")
    axes = style(figure.add_subplot(), title, "% of the split's labels", pad=22)
    thick = 0.8 / len(counts)
    lines = []
    for number, own in enumerate(counts):
        places = np.arange(len(order)) + (number - (len(counts) - 1) / 2) * thick
        shares = 100 * own[order] / max(1, own.sum())
        bars = axes.barh(places, shares, thick * 0.9, color=sign(number)[0])
        texts = [f"{n:,}" if n else "none" for n in own[order]]
        axes.bar_label(bars, texts, padding=3, fontsize=7 if len(order) > 12 else 8, color=INK)
        lines.append(axes.plot([], [], color=sign(number)[0], linewidth=5)[0])
    axes.set_yticks(np.arange(len(order)), [short(names[k], 22) for k in order.tolist()])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.grid(visible=False, axis="y")
    name_lines(axes, lines, list(tables))
    return save(figure, path)


def sizes_plot(tables: Mapping[str, Table], imgsz: int, path: Path) -> Path:
    """Draw how large images are, and boxes where the input is `imgsz` pixels, to `path`."""
    detect = all(table.task == "detect" for table in tables.values())
    figure = new_figure(11, 4.4)
    axes = figure.add_subplot(1, 2, 1)
    style(axes, "Sizes of the images", "width, pixels", "height, pixels", pad=22)
    lines = []
    for number, table in enumerate(tables.values()):
        sizes, counts = np.unique(table.sizes, axis=0, return_counts=True)
        area = 15 + 250 * counts / counts.max()
        colour = sign(number)[0]
        axes.scatter(
            sizes[:, 0], sizes[:, 1], area.tolist(), color=colour, alpha=0.35, edgecolors=colour
        )
        lines.append(axes.plot([], [], "o", color=colour)[0])
    top = max(int(table.sizes.max(initial=1)) for table in tables.values())
    axes.set_xlim(0, 1.12 * top)
    axes.set_ylim(0, 1.12 * top)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    name_lines(axes, lines, list(tables))
    other = figure.add_subplot(1, 2, 2)
    if detect:
        _box_sides(other, tables, imgsz)
    else:
        _shapes(other, tables)
    return save(figure, path)


def _shapes(axes: Axes, tables: Mapping[str, Table]) -> None:
    style(axes, "Shapes of the images", "width / height", "% of images", pad=22)
    bins = np.geomspace(1 / 4, 4, 34)
    for number, table in enumerate(tables.values()):
        shape = table.sizes[:, 0] / table.sizes[:, 1]
        share = 100 * np.histogram(shape.clip(1 / 4, 4), bins)[0] / len(table)
        axes.stairs(share, bins, color=sign(number)[0], linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1 / 4, 1 / 2, 1, 2, 4], ["1 : 4", "1 : 2", "1 : 1", "2 : 1", "4 : 1"])
    axes.minorticks_off()


def _box_sides(axes: Axes, tables: Mapping[str, Table], imgsz: int) -> None:
    sides = [sides_at(table, imgsz) for table in tables.values()]
    style(axes, f"Sides of the boxes at imgsz={imgsz}", "√area, pixels", "% of boxes", pad=22)
    bins = np.geomspace(2, max(4, imgsz), 33)
    lines = []
    for number, own in enumerate(sides):
        counts = np.histogram(np.clip(own, 2, imgsz), bins)[0]
        share = 100 * counts / max(1, len(own))
        lines.append(axes.stairs(share, bins, color=sign(number)[0], linewidth=1.8))
    axes.set_xscale("log", base=2)
    ticks = [2**k for k in range(1, 11) if 2**k <= imgsz]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.axvline(TINY, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        f"hard to find: below {TINY} px",
        (TINY, axes.get_ylim()[1]),
        (-4, -4),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="right",
        va="top",
        rotation=90,
    )
    axes.minorticks_off()
    name_lines(axes, [axes.plot([], [], color=sign(k)[0])[0] for k in range(len(lines))], [*tables])


def twins_picture(tables: Mapping[str, Table], pairs: Sequence[Pair], path: Path) -> Path:
    """Draw pictures that are in two splits side by side, the most doubtful last, to `path`."""
    ordered = sorted(pairs, key=lambda pair: pair.apart)
    even = np.unique(np.linspace(0, len(ordered) - 1, min(SHOWN, len(ordered))).astype(int))
    pictures = []
    for pair in [ordered[k] for k in even]:
        said = "same file" if not pair.apart else f"{pair.apart:.0%} apart"
        both = ((pair.split, pair.row, f" ({said})"), (pair.other_split, pair.other_row, ""))
        found = [_picture(tables[split], split, row, more) for split, row, more in both]
        pictures += [picture for picture in found if picture is not None]
    return save_sheet(grid(pictures, (), columns=4), path)


def _picture(table: Table, split: str, row: int, more: str) -> Picture | None:
    try:
        pixels = table.images.read(row)
    except DataError:
        return None  # among the defects already
    path = Path(table.images.name(row))
    name = f"{path.parent.name}/{path.name}" if table.task == "classify" else path.name
    name = f"{split}: {name}{more}"
    return Picture(pixels, np.zeros((0, 4)), np.zeros(0, np.int64), None, name)


def labels_picture(table: Table, path: Path) -> Path:
    """Draw pictures of a split at even distances with their labels to `path`."""
    pictures = []
    for row, pixels in readable(table, SHOWN):
        own = table.rows(row)
        boxes, classes = table.boxes[own], table.classes[own]
        title = Path(table.images.name(row)).name
        if table.task == "classify":
            title = ", ".join(short(table.names[k], 20) for k in classes.tolist()) or "no label"
            boxes, classes = boxes[:0], classes[:0]
        pictures.append(Picture(pixels, boxes, classes, None, title))
    return save_sheet(grid(pictures, table.names, columns=4), path)
