import logging
from types import SimpleNamespace

import pytest
import torch

from visiontrain.core.errors import DataError
from visiontrain.core.types import Outcome
from visiontrain.engine.run_folder import RunFolder
from visiontrain.recipe import Run
from visiontrain.report import results
from visiontrain.report.results import Scored, coco_results, draw, score_lines

NAN = float("nan")


class Table:
    names = ("cat", "a very long name")
    images = SimpleNamespace(name=lambda row: f"{row}.jpg")

    def __len__(self):
        return 5


def scored(folder, boxes=(3, 0)):
    per_class = {
        name: {"map": 0.25, "map50": NAN, "precision": 0.5, "recall": 1.0, "images": 2, "boxes": n}
        for name, n in zip(Table.names, boxes, strict=True)
    }
    metrics = {"map": 0.25, "map50": 0.5, "precision": 0.5, "recall": 1.0, "per_class": per_class}
    return Scored(Run(), RunFolder(folder), Table(), Outcome(metrics, 0), 1, 10.0)


def test_scores_are_a_table_of_the_classes_that_have_boxes(tmp_path):
    both = score_lines(scored(tmp_path, (3, 4)))
    assert [line.split()[-6:] for line in both[1:]] == [
        ["5", "7", "0.5000", "1.0000", "0.5000", "0.2500"],
        ["2", "3", "0.5000", "1.0000", "-", "0.2500"],
        ["2", "4", "0.5000", "1.0000", "-", "0.2500"],
    ]
    assert len({len(line) for line in both}) == 1
    assert len(score_lines(scored(tmp_path))) == 2  # one class: the line of all says it


def test_rows_become_coco_results():
    (row,) = coco_results(Table(), torch.tensor([[3, 10, 20, 30, 50, 0.5, 1]], dtype=torch.float64))
    assert row == {
        "image_id": 3,
        "file_name": "3.jpg",
        "category_id": 1,
        "bbox": [10.0, 20.0, 20.0, 30.0],
        "score": 0.5,
    }


@pytest.mark.parametrize("error", [OSError("disk"), ValueError("bad"), DataError("gone")])
def test_what_cannot_be_drawn_costs_a_warning(tmp_path, monkeypatch, caplog, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(results, "_plots", fail)
    with caplog.at_level(logging.WARNING):
        assert draw(scored(tmp_path)) == {}
    assert [record.getMessage() for record in caplog.records] == [
        f"plots: {error}; the run is complete without them"
    ]
