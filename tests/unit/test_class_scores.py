"""What is written of whole images: the likeliest classes, or of several labels all found."""

from types import SimpleNamespace

import numpy as np
import torch

from visiontrain.core.types import ClassScores
from visiontrain.prediction import Predicted
from visiontrain.report import class_plots
from visiontrain.report.detections import image_row, yolo_lines

NAMES = tuple("abcdefghij")
SCORES = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.6, 0.95, 0.55, 0.2, 0.5, 0.3])  # seven of 0.5 or more


def test_of_several_labels_all_that_are_found_are_written():
    many = ClassScores(SCORES, NAMES, several=True)
    row = image_row("x.jpg", (8, 8), many, NAMES)
    assert [item["name"] for item in row["classes"]] == list("facdegi")
    assert [line.split()[1] for line in yolo_lines((8, 8), many)] == list("facdegi")
    few = ClassScores(SCORES / 10, NAMES, several=True)  # none: the nearest all the same
    assert len(image_row("x.jpg", (8, 8), few, NAMES)["classes"]) == 5
    one = ClassScores(SCORES / SCORES.sum(), NAMES)
    assert len(image_row("x.jpg", (8, 8), one, NAMES)["classes"]) == 5


def test_the_last_line_counts_each_label_where_it_is_found(tmp_path):
    def said(*scores):
        rows = [
            image_row("x.jpg", (8, 8), ClassScores(torch.tensor(s), NAMES[:3], several=True), NAMES)
            for s in scores
        ]
        return Predicted(tmp_path, rows, [], seconds=1.0).summary()

    assert said([0.9, 0.8, 0.1], [0.2, 0.7, 0.3], [0.1, 0.2, 0.3]).startswith(
        "3 images, 2 b, 1 a, 3.0 images/s"
    )
    assert said([0.9, 0.8, 0.1]).startswith("1 image, a (score 0.90), b (score 0.80), ")
    assert said([0.1, 0.2, 0.1]).startswith("1 image, no class of 0.5 or more, ")


def test_what_images_are_taken_for_is_down_and_what_they_are_across(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        class_plots, "confusion_plot", lambda matrix, *_, **__: seen.append(matrix.tolist())
    )
    labels = np.array([0, 0, 1])
    table = SimpleNamespace(names=("cat", "dog", "owl"), classes=labels, offsets=np.arange(4))
    rows = np.array([[image, 0.9, 0.1, said] for image, said in enumerate((1, 0, 1))])
    class_plots.confusion_plots(table, rows, tmp_path)
    assert seen == [[[1, 0, 0], [1, 1, 0], [0, 0, 0]]] * 2  # of the cats one is called dog
