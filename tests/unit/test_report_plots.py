"""Plots: pictures of the right size, whatever the names and the number of classes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import rcParams
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from visiontrain.core.errors import DataError
from visiontrain.core.types import Batch
from visiontrain.data.table import Table
from visiontrain.metrics.curves import CONFIDENCES, RECALLS, curves
from visiontrain.report import plots
from visiontrain.report.figure import DPI, STRONG, save, short
from visiontrain.report.pictures import CELL, GAP, batch_picture, predictions_picture
from visiontrain.report.plots import confusion_plot, label_plot, results_plot, scored_plots

NAMES = {
    "one": ("_object$",),
    "few": ("_cat", "$a_b$ \\frac", "猫 🐈", "<script>"),
    "many": tuple(f"class {n}" for n in range(80)),
}
SIZE = (160, 120)  # width, height


class Noise:
    """Images of noise; the last one can't be read."""

    def __len__(self):
        return 6

    def read(self, row):
        if row == 5:
            raise DataError("image 5: it is torn; leave it out")
        return np.random.default_rng(row).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)

    def name(self, row):
        return f"folder/$picture_{row}.jpg"


def make_table(names, per_image=12):
    rng = np.random.default_rng(1)
    count = 6 * per_image
    corner = rng.uniform(0, [120, 80], (count, 2))
    side = rng.uniform(10, 40, (count, 2))
    return Table(
        names=tuple(names),
        images=Noise(),
        sizes=np.tile(np.array(SIZE, np.int32), (6, 1)),
        offsets=np.arange(7) * per_image,
        boxes=np.hstack([corner, corner + side]).astype(np.float32),
        classes=rng.integers(0, len(names), count).astype(np.int32),
        crowd=np.zeros(count, np.bool_),
        difficult=rng.random(count) < 0.1,
        area=side.prod(axis=1).astype(np.float32),
    )


def detections_of(table):
    rng = np.random.default_rng(2)
    images = np.repeat(np.arange(len(table)), np.diff(table.offsets))
    moved = table.boxes + rng.normal(0, 2, table.boxes.shape)
    scores = rng.uniform(0.1, 1, len(moved))
    return torch.from_numpy(np.column_stack([images, moved, scores, table.classes]))


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def drawn(image, colour=STRONG):
    """Return where pixels are of `colour`, as shares of the image's width and height (K, 2)."""
    wanted = np.array(to_rgb(colour)) * 255
    ys, xs = (np.abs(image - wanted).max(axis=2) < 3).nonzero()
    return np.column_stack([xs / image.shape[1], ys / image.shape[0]])


@pytest.fixture
def axes(monkeypatch):
    """Collect what is on every plot that is saved, by the names of its file and itself."""
    found = {}

    def keep(figure, path):
        for one in figure.axes:  # saving clears them
            found[path.name, one.get_title(loc="left")] = SimpleNamespace(
                lines=[(line.get_color(), *line.get_data()) for line in one.get_lines()],
                labels=(one.get_xlabel(), one.get_ylabel()),
                names=[[t.get_text() for t in a.get_ticklabels()] for a in (one.xaxis, one.yaxis)],
            )
        return save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    return found


@pytest.mark.parametrize("count", NAMES)
def test_scored_plots_are_pictures_and_leave_nothing_behind(count, tmp_path):
    before = dict(rcParams)
    gc.collect()
    figures = sum(type(thing) is Figure for thing in gc.get_objects())
    table = make_table(NAMES[count])
    paths = scored_plots(table, detections_of(table), tmp_path / "plots")
    names = {path.name for path in paths}
    curves = {f"{name}_curve.png" for name in ("pr", "f1", "precision", "recall")}
    matrices = {"confusion_matrix.png", "confusion_matrix_normalized.png"}
    assert names == curves | matrices | {"val_predictions.png"}
    for path in paths:
        image = pixels(path)
        assert min(image.shape[:2]) >= 400
        if path.stem.endswith("_curve"):
            across = drawn(image)  # the mean, beside the legend's short sample of it
            assert np.ptp(across[:, 0]) > 0.5
            assert len(across) > 2000
    assert pixels(tmp_path / "plots/pr_curve.png").shape == (round(5.4 * DPI), 9 * DPI, 3)
    gc.collect()
    assert sum(type(thing) is Figure for thing in gc.get_objects()) <= figures
    assert dict(rcParams) == before
    assert not Gcf.figs  # pyplot holds none


def test_curves_are_those_of_the_scores(axes, tmp_path):
    table = make_table(NAMES["few"])
    rows = detections_of(table)
    scored_plots(table, rows, tmp_path)
    found = curves(table, rows)
    precision = np.where(found.predicted > 0, found.precision, np.nan)
    for title, name, x, values in (
        ("Precision by recall", "pr", RECALLS, found.precision_at_recall),
        ("F1 by confidence", "f1", CONFIDENCES, found.f1),
        ("Precision by confidence", "precision", CONFIDENCES, precision),
        ("Recall by confidence", "recall", CONFIDENCES, found.recall),
    ):
        mean, *classes = axes[f"{name}_curve.png", title].lines[:5]
        assert mean[0] == STRONG
        for (_, xs, ys), expected in zip([mean, *classes], [None, *values], strict=True):
            np.testing.assert_array_equal(xs, x)
            if expected is not None:
                np.testing.assert_array_equal(ys, expected)
        known = np.isfinite(values).all(axis=0)
        np.testing.assert_allclose(mean[2][known], values.mean(axis=0)[known])
    best = axes["f1_curve.png", "F1 by confidence"].lines[5]  # from top to bottom
    assert list(best[1]) == [CONFIDENCES[found.best]] * 2


@pytest.mark.parametrize("normalized", [False, True])
def test_a_confusion_matrix_has_the_true_class_across_and_the_predicted_one_down(
    normalized, axes, tmp_path
):
    blue, places = matplotlib.colormaps["Blues"](1.0)[:3], []
    for predicted, true in ((0, 2), (2, 0)):
        matrix = np.zeros((4, 4), np.int64)
        matrix[predicted, true] = 9
        path = confusion_plot(matrix, list("abc"), tmp_path / "c.png", normalized=normalized)
        places.append(np.median(drawn(pixels(path), blue), axis=0))
    (first_x, first_y), (second_x, second_y) = places
    assert first_x > second_x + 0.2  # in the third column
    assert first_y < second_y - 0.2  # in the first row, from the top
    (plot,) = (plot for (_, title), plot in axes.items() if title.startswith("Confusion"))
    assert plot.labels == ("true", "predicted")
    assert plot.names == [["a", "b", "c", "background"]] * 2


def test_plots_of_nothing_are_still_pictures(tmp_path):
    table = make_table(["cat"], per_image=0)
    for path in scored_plots(table, torch.empty(0, 7, dtype=torch.float64), tmp_path):
        assert pixels(path).size
    assert pixels(label_plot(table, tmp_path / "labels.png")).size
    assert pixels(results_plot(tmp_path / "results.csv", tmp_path / "results.png")).size


@pytest.mark.parametrize("count", NAMES)
def test_labels_fit(count, tmp_path):
    image = pixels(label_plot(make_table(NAMES[count]), tmp_path / "labels.png"))
    assert image.shape[1] == 11 * DPI
    assert image.shape[0] <= 9.4 * DPI


def test_a_confusion_matrix_of_a_thousand_classes_is_not_a_wall(tmp_path):
    matrix = np.diag(np.arange(301))
    path = confusion_plot(matrix, [f"class {n}" for n in range(300)], tmp_path / "c.png")
    assert max(pixels(path).shape) < 2400


def test_results_are_drawn_from_the_first_epoch_on(axes, tmp_path):
    head = "epoch,step,lr,train/o2m/box,train/o2o/box,val/map,val/map_small,bytes_sent\n"
    rows = [f"{n},{n * 10},0.01,{3 / n},{2 / n},{1 - 1 / n},nan,0\n" for n in range(1, 30)]
    sizes = set()
    for count in (1, 29):
        (tmp_path / "results.csv").write_text(head + "".join(rows[:count]))
        image = pixels(results_plot(tmp_path / "results.csv", tmp_path / "results.png"))
        sizes.add(image.shape)
        losses = axes["results.png", "Training loss: box"].lines
        scores = axes["results.png", "Average precision"].lines
        epochs = np.arange(1, count + 1)
        for line, values in zip([*losses, *scores], (3, 2, None), strict=True):
            np.testing.assert_array_equal(line[1], epochs)
            expected = 1 - 1 / epochs if values is None else values / epochs
            np.testing.assert_allclose(line[2], expected)
        assert len(drawn(image)) > 20 * count
    assert sizes == {(round(3.1 * DPI), round(4.6 * 3 * DPI), 3)}  # three panels, side by side


def test_a_batch_shows_real_images_with_their_boxes(tmp_path):
    images = torch.full((3, 3, 64, 64), 200, dtype=torch.uint8)
    targets = torch.full((3, 2, 6), -1.0)
    targets[0, 0] = torch.tensor([1, 8, 30, 56, 60, 1])
    batch = Batch(images, targets, torch.arange(3), torch.zeros(3, 5), torch.tensor([1, 0, 1]))
    plain = pixels(batch_picture(batch, ["cat", "_dog"], tmp_path / "batch.png"))
    assert plain.shape[1] == 2 * (CELL + GAP) + GAP  # the one that fills a place is left out
    halves = plain[:, : GAP + CELL], plain[:, GAP + CELL :]
    colourful = [
        int((half.max(axis=2) - half.min(axis=2).astype(int) > 60).sum()) for half in halves
    ]
    assert colourful[0] > 1000
    assert colourful[1] == 0
    floats = batch.to(torch.device("cpu"))
    np.testing.assert_array_equal(
        pixels(batch_picture(floats, ["cat", "_dog"], tmp_path / "floats.png")), plain
    )


def test_predictions_stand_beside_labels_and_torn_images_are_left_out(tmp_path):
    table = make_table(NAMES["few"])
    path = predictions_picture(table, detections_of(table), tmp_path / "p.png", images=6)
    image = pixels(path)
    assert image.shape[1] == 4 * (CELL + GAP) + GAP  # label, prediction, label, prediction
    lines = 3  # ten cells of the five readable images
    assert lines * CELL < image.shape[0] < (lines + 1) * CELL


def test_long_names_lose_their_middle():
    assert short("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert short("two\nlines") == "two lines"
