"""What COCO has and toys have not: crowds, specks, slivers, empty images, many classes."""

import csv
import json
import math

import cv2
import numpy as np
import pytest
from small import prepared, watched

from visiontrain.tasks import detect

CLASSES, CROWD, SIDE, EPOCHS = 80, 300, 128, 8


def crowd(random):
    """Return boxes (class, centre, size, as shares): specks of 4 px, slivers of 1:20, others."""
    label = random.integers(0, CLASSES, CROWD)
    size = random.uniform(4, 40, (CROWD, 2))
    size[:100] = 4
    size[100:150] = 80, 4
    size[150:200] = 4, 80
    centre = random.uniform(0, SIDE, (CROWD, 2))
    centre = np.clip(centre, size / 2, SIDE - size / 2)
    return np.column_stack([label, centre / SIDE, size / SIDE])


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for folder in ("images", "labels"):
            (tmp_path / folder / split).mkdir(parents=True)
        for number in range(count):
            boxes = crowd(random) if number % 4 else np.zeros((0, 5))
            picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
            for label, x, y, w, h in boxes:
                corner = (int((x - w / 2) * SIDE), int((y - h / 2) * SIDE))
                other = (int((x + w / 2) * SIDE) - 1, int((y + h / 2) * SIDE) - 1)
                shade = (int(label) * 3, 255 - int(label) * 3, int(label) * 7 % 256)
                cv2.rectangle(picture, corner, other, shade, -1)
            cv2.imwrite(str(tmp_path / "images" / split / f"{number}.png"), picture)
            lines = (f"{int(row[0])} " + " ".join(f"{v:.6f}" for v in row[1:]) for row in boxes)
            (tmp_path / "labels" / split / f"{number}.txt").write_text("\n".join(lines))
    names = [f"kind {number}" for number in range(CLASSES)]
    description = f"train: images/train\nval: images/val\nnames: {json.dumps(names)}\n"
    (tmp_path / "data.yaml").write_text(description)
    return str(tmp_path / "data.yaml")


def resident():
    """Return this process's memory, MB."""
    with open("/proc/self/status") as file:  # noqa: PTH123 - a file of the kernel's
        line = next(line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.parametrize("keys", [{}, {"model": {"kind": "yolo_n", "head": "nms", "finest": 4}}])
def test_crowds_of_specks_and_slivers_train(tmp_path, data, keys, monkeypatch):
    out = tmp_path / "run"
    changes = {"data": data, "imgsz": SIDE, "batch": 4, "epochs": EPOCHS, "workers": 0}
    made, joined = [], detect.joined
    monkeypatch.setattr(detect, "COMPARED", 2**19)  # less than two crowded images
    monkeypatch.setattr(detect, "joined", lambda parts: made.append(len(parts)) or joined(parts))
    _, trainer = prepared(out, **changes, **{"augment.mixup": 0.5}, **keys)
    used = []
    watch = watched(trainer)
    watch.end_epoch = lambda row: used.append(resident())
    outcome = trainer.fit()
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    terms = [float(row[name]) for row in rows for name in row if name.startswith("train/")]
    assert len(rows) == EPOCHS
    assert all(math.isfinite(term) for term in terms)
    assert outcome.metrics["skipped_steps"] == 0
    assert max(made) > 1, "no crowd was cut"
    # The first epochs allocate what is kept for the next ones.
    assert max(used[-2:]) < 1.1 * used[EPOCHS // 2], used
