"""Real data: BCCD, where it is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
from layouts import opened

from visiontrain.data.check import check

FOLDER = os.environ.get("VISIONTRAIN_DATASETS")
pytestmark = pytest.mark.skipif(
    FOLDER is None or not (Path(FOLDER) / "bccd").is_dir(),
    reason="needs $VISIONTRAIN_DATASETS with bccd in it",
)


def test_bccd_is_read_whole(tmp_path):
    spec = opened("bccd", tmp_path)
    tables = {split: spec.table(split) for split in ("train", "val", "test")}
    assert [len(table) for table in tables.values()] == [205, 87, 72]
    counts = [np.bincount(table.classes).tolist() for table in tables.values()]
    assert counts == [[209, 2381, 214], [83, 967, 87], [69, 805, 71]]
    for table in tables.values():
        assert (table.sizes == (640, 480)).all()
        assert (table.boxes.min(), table.boxes[:, 2].max(), table.boxes[:, 3].max()) == (
            0,
            640,
            480,
        )


def test_the_slips_of_bccd_are_named(tmp_path):
    report = check(opened("bccd", tmp_path), ["train", "val"])
    found = [(Path(d.file).stem, d.kind) for split in report.splits for d in split.defects]
    assert found == [
        ("BloodImage_00343", "empty-box"),
        ("BloodImage_00338", "empty-box"),
        ("BloodImage_00037", "near-duplicate"),  # of 38: two pictures of one place
    ]
    assert report.trainable
