import json
import logging
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from layouts import opened, write_coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from visiontrain.core.errors import DataError, StorageError
from visiontrain.core.types import Outcome
from visiontrain.engine.run_folder import RunFolder
from visiontrain.metrics.detection import DetectionEvaluator
from visiontrain.recipe import Run
from visiontrain.report import results
from visiontrain.report.results import (
    Scored,
    coco_results,
    draw,
    score_lines,
    write_results,
)
from visiontrain.strategies import devices
from visiontrain.strategies.config import ParameterServer, Single
from visiontrain.strategies.federated.config import Federated

NAN = float("nan")


class Table:
    names = ("cat", "a very long name")
    images = SimpleNamespace(name=lambda row: f"{row}.jpg")
    image_ids = category_ids = None
    task, several = "detect", False

    def __len__(self):
        return 5


def scored(folder, boxes=(3, 0)):
    per_class = {
        name: {"map": 0.25, "map50": NAN, "precision": 0.5, "recall": 1.0, "images": 2, "boxes": n}
        for name, n in zip(Table.names, boxes, strict=True)
    }
    metrics = {"map": 0.25, "map50": 0.5, "precision": 0.5, "recall": 1.0, "per_class": per_class}
    return Scored(Run(), RunFolder(folder), Table(), Outcome(metrics, 0), 1, [10.0], "")


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


def test_results_are_scored_by_the_users_own_json(tmp_path):
    """Ids of images and categories are those of the file, here 100 ... and 7, 3."""
    source = Path(write_coco(tmp_path / "set"))
    content = json.loads(source.read_text())
    for item in content["annotations"]:
        item["id"] += 1  # pycocotools takes 0 for "none"
    source.write_text(json.dumps(content))
    table = opened(source, tmp_path / "cache").table("train")
    random = np.random.default_rng(0)
    images = np.repeat(np.arange(len(table)), np.diff(table.offsets)).repeat(3)
    moved = table.boxes.repeat(3, axis=0) + random.integers(-2, 3, (len(images), 4))
    classes = np.where(random.random(len(images)) < 0.8, table.classes.repeat(3), 0)
    scores = random.permutation(len(images)) / 16
    rows = torch.from_numpy(np.column_stack([images, moved, scores, classes]))
    ours = DetectionEvaluator(table).compute(rows)
    with redirect_stdout(None):
        known = COCO(str(source))
        theirs = COCOeval(known, known.loadRes(coco_results(table, rows)), "bbox")
        theirs.evaluate()
        theirs.accumulate()
        theirs.summarize()
    keys = ("map", "map50", "map75")
    assert [ours[key] for key in keys] == pytest.approx(theirs.stats[:3], abs=1e-12)
    assert 0.2 < ours["map"] < 0.9


def test_the_scores_are_safe_before_detections_are_written(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("no space")

    monkeypatch.setattr(results, "write_json", full)
    some = scored(tmp_path)
    outcome = replace(some.outcome, rows=torch.empty(0, 7, dtype=torch.float64))
    with pytest.raises(StorageError):
        write_results(replace(some, run=Run(save_json=True), outcome=outcome), "1.0")
    assert json.loads((tmp_path / "metrics.json").read_text())["map"] == 0.25


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


def test_threads_are_those_of_the_processes_that_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 12)
    modes = {
        4: ParameterServer(processes=3),
        5: ParameterServer(processes=3, threads=5),
        6: Federated(clients=2),
        torch.get_num_threads(): Single(),
    }
    for threads, mode in modes.items():
        one = scored(tmp_path)
        one = replace(one, run=one.run.model_copy(update={"strategy": mode}))
        assert results.summary(one, "0")["threads"] == threads
