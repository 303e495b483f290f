"""Plots: pictures of the right size, whatever the names and the number of classes."""

from __future__ import annotations

import gc
from dataclasses import replace
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
from visiontrain.metrics.curves import CONFIDENCES, RECALLS, Curves, curves
from visiontrain.report import confusion, pictures, plots
from visiontrain.report.draw import font_of
from visiontrain.report.figure import DPI, STRONG, save, short
from visiontrain.report.pictures import (
    CELL,
    FONT,
    GAP,
    TITLE,
    batch_picture,
    predictions_picture,
)
from visiontrain.report.plots import confusion_plot, label_plot, results_plot, scored_plots

NAMES = {
    "one": ("_object$",),
    "few": ("_cat", "$a_b$ \\frac", "猫 🐈", "<script>"),
    "many": tuple(f"class {n}" for n in range(80)),
}
SIZE = (160, 120)  # width, height
FLAT = ("classes", "crowd", "difficult", "area")  # of a table: one entry per box


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

    def collect(figure, path):
        for one in figure.axes:
            legend = one.get_legend()
            head = one.get_title(loc="left")
            found[path.name, head.split("\n")[0]] = SimpleNamespace(
                head=head,
                legend=[text.get_text() for text in legend.texts] if legend else [],
                legend_title=legend.get_title().get_text() if legend else "",
                covered=bool(legend) and legend.get_window_extent().overlaps(one.bbox),
                ticks=[axis.get_majorticklocs() for axis in (one.xaxis, one.yaxis)],
                limits=(one.get_xlim(), one.get_ylim()),
                texts=list(one.texts),
                bars=[(bar.get_y(), bar.get_height()) for bar in one.patches],
                lines=[(line.get_color(), *line.get_data()) for line in one.get_lines()],
                labels=(one.get_xlabel(), one.get_ylabel()),
                names=[[t.get_text() for t in a.get_ticklabels()] for a in (one.xaxis, one.yaxis)],
            )

    def keep(figure, path):
        clear = figure.clear

        def after_drawing():
            collect(figure, path)
            clear()

        figure.clear = after_drawing
        return save(figure, path)

    for drawing in (plots, confusion):
        monkeypatch.setattr(drawing, "save", keep)
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
    precision = np.where(found.predicted > 0, found.precision, 1)
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
        np.testing.assert_allclose(mean[2], values.mean(axis=0))  # of all classes, everywhere
    f1 = axes["f1_curve.png", "F1 by confidence"]
    assert list(f1.lines[5][1]) == [CONFIDENCES[found.best]] * 2  # from top to bottom
    (note,) = f1.texts
    assert note.get_bbox_patch().get_facecolor()[:3] == (1, 1, 1)  # curves do not cross it
    assert note.get_zorder() > 4  # the mean's


def test_a_class_without_detections_left_stays_in_the_mean_of_precision():
    count = np.zeros((3, 1001), np.int64)
    few = count.copy()
    few[0, :500], few[1, :800] = 4, 2  # of class 2 there is none at all
    right = np.stack([few[0] // 2, few[1] // 2, few[2]])
    found = Curves(("a", "b", "c"), np.array([5, 5, 5]), few, right, np.zeros((3, 101)))
    values = plots.precision_left(found)
    assert values[:, 0].tolist() == [0.5, 0.5, 0]
    assert values[:, 600].tolist() == [1, 0.5, 0]
    assert values[:, 900].tolist() == [1, 1, 0]


def test_legends_say_what_their_plot_shows(axes, tmp_path):
    table = make_table(NAMES["few"])
    found = curves(table, detections_of(table))
    scored_plots(table, detections_of(table), tmp_path)
    names = ["mean of 4", *(short(name) for name in table.names)]
    pr, f1 = axes["pr_curve.png", "Precision by recall"], axes["f1_curve.png", "F1 by confidence"]
    assert (pr.legend_title, f1.legend_title) == ("AP at overlap 0.5", "highest F1")
    aps = [found.ap.mean(), *found.ap]
    assert pr.legend == [f"{name}  {ap:.3f}" for name, ap in zip(names, aps, strict=True)]
    highest = found.f1.mean(axis=0).max(), *found.f1.max(axis=1)
    for text, name, value in zip(f1.legend, names, highest, strict=True):
        assert text.startswith(f"{name}  {value:.3f} at 0.")
    assert f1.legend[0].endswith(f" at {CONFIDENCES[found.best]:.2f}")
    for what in ("Precision", "Recall"):
        plot = axes[f"{what.lower()}_curve.png", f"{what} by confidence"]
        assert (plot.legend_title, plot.legend) == ("class", names)
    assert not any(plot.covered for plot in axes.values())


def test_of_many_classes_the_best_and_the_worst_are_named(axes, tmp_path):
    table = make_table(NAMES["many"])
    scored_plots(table, detections_of(table), tmp_path)
    for name, title, ends in (
        ("f1", "F1 by confidence", ("best: ", "worst: ")),
        ("recall", "Recall by confidence", ("best AP: ", "worst AP: ")),
    ):
        _, *named = axes[f"{name}_curve.png", title].legend
        assert [text.split("class")[0] for text in named] == [ends[0]] * 3 + [ends[1]] * 3
    last = axes["f1_curve.png", "F1 by confidence"].legend[-1]
    assert last.endswith("  0.000")  # nowhere in particular


@pytest.mark.parametrize("normalized", [False, True])
def test_a_confusion_matrix_has_the_true_class_across_and_the_predicted_one_down(
    normalized, axes, tmp_path
):
    blue, places = matplotlib.colormaps["Blues"](1.0)[:3], []
    for predicted, true in ((0, 2), (2, 0)):
        matrix = np.zeros((4, 4), np.int64)
        matrix[predicted, true] = 9
        path = confusion_plot(
            matrix,
            [*"abc", "background"],
            tmp_path / "c.png",
            "confidence above 0.25, IoU from 0.45",
            normalized=normalized,
        )
        places.append(np.median(drawn(pixels(path), blue), axis=0))
    (first_x, first_y), (second_x, second_y) = places
    assert first_x > second_x + 0.2  # in the third column
    assert first_y < second_y - 0.2  # in the first row, from the top
    (plot,) = (plot for (_, title), plot in axes.items() if title.startswith("Confusion"))
    assert plot.labels == ("true", "predicted")
    assert plot.head.endswith("\nconfidence above 0.25, IoU from 0.45")
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


@pytest.mark.parametrize("count", [1, 2, 5, 6, 9])
def test_the_bars_of_few_classes_fill_their_panel_and_are_no_blocks(count, axes, tmp_path):
    table = make_table([f"class {n}" for n in range(count)], per_image=count)
    label_plot(table, tmp_path / "labels.png")
    (plot,) = (plot for (_, title), plot in axes.items() if "boxes in" in title)
    assert plot.limits[1] == (count - 0.5, -0.5)
    assert all(height / count <= 0.8 / 6 + 1e-9 for _, height in plot.bars)
    assert [y + height / 2 for y, height in plot.bars] == pytest.approx(list(range(count)))
    assert all(tick == round(tick) for tick in axes["labels.png", "Boxes per image"].ticks[1])


def test_one_box_is_not_written_as_many(axes, tmp_path):
    table = make_table(["cat"], per_image=0)
    one = replace(
        table,
        offsets=np.array([0, 1, 1, 1, 1, 1, 1]),
        boxes=np.array([[10, 10, 50, 50]], np.float32),
        **{key: np.zeros(1, getattr(table, key).dtype) for key in FLAT},
    )
    label_plot(one, tmp_path / "labels.png")
    assert ("labels.png", "1 box in 6 images") in axes


def test_a_confusion_matrix_of_a_thousand_classes_is_not_a_wall(tmp_path):
    matrix = np.diag(np.arange(301))
    path = confusion_plot(matrix, [f"class {n}" for n in range(len(matrix))], tmp_path / "c.png")
    assert max(pixels(path).shape) < 2400


def test_results_are_drawn_from_the_first_epoch_on(axes, tmp_path):
    head = "epoch,step,lr,train/o2m/box,train/o2o/box,val/map,val/map50,val/map_small,bytes_sent\n"
    rows = [f"{n},{n * 10},0.01,{3 / n},{2 / n},{1 - 1 / n},1,nan,0\n" for n in range(1, 30)]
    sizes = set()
    for count in (1, 2, 29):
        (tmp_path / "results.csv").write_text(head + "".join(rows[:count]))
        image = pixels(results_plot(tmp_path / "results.csv", tmp_path / "results.png"))
        sizes.add(image.shape)
        losses = axes["results.png", "Training loss: box"].lines
        scores = axes["results.png", "Average precision"].lines
        epochs = np.arange(1, count + 1)
        expected = (3 / epochs, 2 / epochs, 1 - 1 / epochs, np.ones(count))
        for line, values in zip([*losses, *scores], expected, strict=True):
            np.testing.assert_array_equal(line[1], epochs)
            np.testing.assert_allclose(line[2], values)
        assert len(drawn(image)) > 20 * count
        for (_, title), plot in axes.items():
            ticks = [tick for tick in plot.ticks[0] if epochs[0] <= tick <= epochs[-1]]
            assert ticks
            assert all(tick == round(tick) for tick in plot.ticks[0]), title
            assert plot.labels[0] == "epoch"
            assert not plot.covered
    assert sizes == {(round(3.4 * DPI), round(4.6 * 3 * DPI), 3)}  # three panels, side by side


def test_results_are_named_for_people_and_lie_inside_their_panels(axes, tmp_path):
    keys = ("map", "map50", "map75", "map_small", "map_medium", "map_large", "f1", "recall")
    head = ",".join(["epoch,step,lr,train/o2m/cls,train/o2o/cls", *(f"val/{k}" for k in keys)])
    rows = [f"{n},{n},0,2,1,0,1,{1 - n / 1000},0,0,1,1,1" for n in (1, 2)]
    (tmp_path / "results.csv").write_text("\n".join([head, *rows, ""]))
    results_plot(tmp_path / "results.csv", tmp_path / "results.png")
    legends = {title: plot.legend for (_, title), plot in axes.items()}
    assert legends == {
        "Training loss: cls": ["one-to-many head", "one-to-one head"],
        "Average precision": ["mAP50-95", "mAP50", "mAP75"],
        "At the best confidence": ["recall", "F1"],
        "mAP50-95 by size of box": ["small", "medium", "large"],
        "Learning rate": [],
    }
    for plot in axes.values():
        low, high = plot.limits[1]
        for _, _, values in plot.lines:  # nothing lies on an edge, that would cut it in two
            assert min(values) - low >= 0.03 * (high - low)
            assert high - max(values) >= 0.03 * (high - low)


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


def test_a_cell_without_predictions_says_how_near_the_best_one_came(monkeypatch, tmp_path):
    titles = []

    def grid(shown, *rest, **keys):
        titles.extend(picture.title for picture in shown if picture.scores is not None)
        return original(shown, *rest, **keys)

    original = pictures.grid
    monkeypatch.setattr(pictures, "grid", grid)
    table = make_table(NAMES["few"])
    rows = detections_of(table)[:3]  # of the first image
    for scores in ([0.9, 0.2, 0.1], [0.25, 0.0123, 0.1]):
        rows[:, 5] = torch.tensor(scores)
        predictions_picture(table, rows, tmp_path / "p.png", images=2)
    near = "prediction: nothing above 0.25, best score 0.25"
    assert titles == ["prediction: 1 box", near]
    longest = near[: -len("0.25")] + "0.0012"
    assert short(longest, TITLE) == longest
    assert font_of(FONT).getlength(longest) <= CELL


def test_decisions_on_several_classes_are_made_at_a_half(axes, tmp_path):
    (tmp_path / "results.csv").write_text("epoch,step,val/map,val/precision\n1,1,0.5,0.4\n")
    results_plot(tmp_path / "results.csv", tmp_path / "results.png")
    assert [title for _, title in axes] == ["Average precision", "At a score of a half"]
