"""The plots of a classifier: confusion, calibration, pictures, labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.errors import DataError
from visiontrain.data.defects import counted
from visiontrain.data.table import Table
from visiontrain.metrics.classification import (
    BINS,
    FIRST,
    IMAGE,
    SURE,
    calibration,
    calibration_error,
    confusion,
    truth,
    unique_rows,
)
from visiontrain.report.confusion import confusion_plot
from visiontrain.report.figure import FAINT, STRONG, new_figure, save, short, style
from visiontrain.report.pictures import Picture, grid, save_sheet
from visiontrain.report.plots import class_bars

SHOWN = 16  # pictures
COMPARED = 2000  # classes at most, each with each: more are no picture, and gigabytes


def class_plots(table: Table, rows: Tensor, folder: Path) -> list[Path]:
    """Draw all that a classifier's rows of a split show."""
    if table.several:
        return [scores_picture(table, rows, folder / "examples.png")]
    array = unique_rows(rows)
    return [
        *(confusion_plots(table, array, folder) if len(table.names) <= COMPARED else ()),
        calibration_plot(table, array, folder / "calibration.png"),
        mistakes_picture(table, array, folder / "examples.png"),
    ]


def confusion_plots(table: Table, array: NDArray[np.float64], folder: Path) -> list[Path]:
    """Draw what the images of each class are taken for: counts, and shares of the class."""
    matrix, shares = confusion(table, array).T, folder / "confusion_matrix_normalized.png"
    return [
        confusion_plot(matrix, table.names, folder / "confusion_matrix.png"),
        confusion_plot(matrix, table.names, shares, normalized=True),
    ]


def calibration_plot(table: Table, array: NDArray[np.float64], path: Path) -> Path:
    """Draw how often predictions of a confidence are right (Guo et al. 2017) to `path`."""
    own = truth(table)[array[:, IMAGE].astype(int)]
    right = array[:, FIRST] == own
    images, confidence, accuracy = calibration(array[:, SURE], right).T
    figure = new_figure(6, 6)
    error = calibration_error(array[:, SURE], right)
    title = f"Calibration: confidence is off by {error:.3f} on average"
    title += f"\na point for each of {BINS} ranges of confidence, as large as its images are many"
    axes = style(figure.add_subplot(), title, "confidence", "share that is right")
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.5)
    known = images > 0
    sizes = 20 + 280 * images[known] / images.max()
    axes.scatter(confidence[known], accuracy[known], sizes.tolist(), color=STRONG, alpha=0.8)
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.03)
    return save(figure, path)


def mistakes_picture(table: Table, array: NDArray[np.float64], path: Path) -> Path:
    """Draw the mistakes that were made most surely, then pictures at even distances, to `path`."""
    own = truth(table)
    wrong = array[array[:, FIRST] != own[array[:, IMAGE].astype(int)]]
    worst = wrong[np.argsort(-wrong[:, SURE], kind="stable")][: SHOWN // 2]
    even = np.unique(np.linspace(0, len(array) - 1, SHOWN - len(worst)).astype(int))
    pictures = []
    for row in [*worst, *array[even]]:
        image, said = int(row[IMAGE]), int(row[FIRST])
        label = table.names[own[image]]
        mark = "" if said == own[image] else f", is {short(label, 16)}"
        pictures.append(
            _titled(table, image, f"{short(table.names[said], 16)} {row[SURE]:.2f}{mark}")
        )
    return save_sheet(grid([p for p in pictures if p], table.names, columns=4), path)


def scores_picture(table: Table, rows: Tensor, path: Path) -> Path:
    """Draw pictures at even distances, with the classes they were given, to `path`."""
    array = unique_rows(rows)
    pictures = []
    for row in array[np.unique(np.linspace(0, len(array) - 1, SHOWN).astype(int))]:
        image = int(row[IMAGE])
        said = [short(table.names[k], 16) for k in np.flatnonzero(row[1:] >= 0.5)]
        pictures.append(_titled(table, image, ", ".join(said) or "nothing above 0.5"))
    return save_sheet(grid([p for p in pictures if p], table.names, columns=4), path)


def _titled(table: Table, image: int, title: str) -> Picture | None:
    """Return a picture under a title; None where it cannot be read."""
    try:
        pixels = table.images.read(image)
    except DataError:
        return None  # named and counted where the split was loaded
    return Picture(pixels, np.zeros((0, 4)), np.zeros(0, np.int64), None, title)


def class_label_plot(table: Table, path: Path) -> Path:
    """Draw how many images each class has, and how large they are, to `path`."""
    counts = np.bincount(table.classes, minlength=len(table.names))
    shown = min(len(counts), 60)
    figure = new_figure(11, float(np.clip(3.4 + 0.1 * shown, 4.4, 9.4)))
    left, right = figure.subplots(1, 2)
    head = f"{counted(len(table), 'image')}, {counted(len(table.names), 'class')}"
    class_bars(style(left, head, "images"), table.names, counts, shown, "images")
    axes = style(right, "Sides of the images", "pixels, geometric mean of both", "images")
    axes.hist(np.sqrt(table.sizes.prod(axis=1, dtype=np.float64)), bins=40, color=STRONG)
    return save(figure, path)
