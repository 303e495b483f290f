"""The picture of a confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from numpy.typing import NDArray

from visiontrain.report.figure import INK, new_figure, save, short, style

Floats = NDArray[np.floating]
NUMBERS = 26  # rows up to which the numbers are shown


def confusion_plot(
    matrix: NDArray[np.int64],
    names: Sequence[str],
    path: Path,
    note: str = "",
    *,
    normalized: bool = False,
) -> Path:
    """Draw a confusion matrix (C, C), row = predicted, column = true, to `path`.

    Normalised, each column adds up to 1: what became of the truth of a class.

    Args:
        matrix: counts.
        names: of its rows and columns.
        path: where to.
        note: what is counted, under the title.
        normalized: draw shares.
    """
    values = matrix.astype(np.float64)
    if normalized:
        values = values / np.maximum(values.sum(axis=0, keepdims=True), 1)
    count = len(matrix)
    side = float(np.clip(3.0 + 0.42 * count, 4.5, 18))
    font = float(np.clip(72 * 0.55 * (side - 2.4) / count, 4, 10))  # points that a cell holds
    figure = new_figure(side + 1.2, side)
    title = "Confusion, share of each true class" if normalized else "Confusion, counts"
    axes = style(figure.add_subplot(), f"{title}\n{note}".strip(), "true", "predicted")
    axes.grid(visible=False)
    norm = None if normalized else PowerNorm(0.5, 0, max(values.max(), 1))
    limits = (0, 1) if normalized else (None, None)
    image = axes.imshow(
        np.ma.masked_equal(values, 0),  # white where nothing is
        cmap=matplotlib.colormaps["Blues"],
        norm=norm,
        vmin=limits[0],
        vmax=limits[1],
    )
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).outline.set_visible(False)
    _name_cells(axes, names, font)
    if count <= NUMBERS:
        _number_cells(axes, values, normalized=normalized, font=font)
    return save(figure, path)


def _name_cells(axes: Axes, names: Sequence[str], font: float) -> None:
    labels = [short(name, 20) for name in names]
    step = math.ceil(len(labels) / 120)  # beyond that, names would lie on each other
    ticks = list(range(0, len(labels), step))
    axes.set_xticks(ticks, [labels[n] for n in ticks], fontsize=font, rotation=90)
    axes.set_yticks(ticks, [labels[n] for n in ticks], fontsize=font)


def _number_cells(axes: Axes, values: Floats, *, normalized: bool, font: float) -> None:
    top = max(values.max(), 1e-9)
    for row, column in np.argwhere(values > 0):
        value = values[row, column]
        dark = value / top > (0.55 if normalized else 0.3)  # counts are drawn by square root
        text = f"{value:.2f}" if normalized else f"{value:.0f}"
        colour = "white" if dark else INK
        size = font if len(text) < 5 else font * 4 / len(text)
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
