"""What each process of a prediction writes as it goes."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from visiontrain.core.errors import StorageError
from visiontrain.core.types import Detections
from visiontrain.data.inputs import Input
from visiontrain.data.shots import Shot
from visiontrain.predict_config import PredictConfig
from visiontrain.report.predictions import ShotWriter


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_keeps_what_was_found(tmp_path):
    config = PredictConfig(weights="w", source="s", save=False, out=str(tmp_path / "new"))
    pixels = np.zeros((8, 8, 3), np.uint8)
    shot = Shot(Input(tmp_path / "a.png", "a.png"), 0, None, pixels)
    found = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    with closing(ShotWriter(config, 0, ["a"], [shot.input])) as writer:
        writer.add(shot, found)  # makes the folder, which another machine lacks
    (tmp_path / "new" / "predictions.part1.jsonl").symlink_to("/dev/full")
    with closing(ShotWriter(config, 1, ["a"], [shot.input])) as writer:
        with pytest.raises(StorageError, match="no space left on the disk"):
            writer.add(shot, found)
        assert [row["file_name"] for _, row in writer.rows] == ["a.png"]
