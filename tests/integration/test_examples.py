"""The examples of docs/examples, run as a reader would run them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from visiontrain.data.config import DataConfig
from visiontrain.data.open import open_dataset

EXAMPLES = Path(__file__).parents[2] / "docs/examples"


def write_cells(folder):
    """Write scenes as pictures beside a CSV of boxes."""
    folder.mkdir()
    table = open_dataset(DataConfig(source="tiny")).table("train")
    rows = [["image", "x1", "y1", "x2", "y2", "label"]]
    for row in range(len(table)):
        name = f"{row}.png"
        cv2.imwrite(str(folder / name), np.ascontiguousarray(table.images.read(row)[..., ::-1]))
        boxes = table.rows(row)
        for box, label in zip(table.boxes[boxes], table.classes[boxes], strict=True):
            rows.append([name, *box.tolist(), table.names[label]])
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs(example, tmp_path):
    write_cells(tmp_path / "cells")
    found = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert list(tmp_path.glob("runs/*/train/weights/best.safetensors"))
    assert found.stdout.splitlines()[-1].startswith(("val ", "step "))
