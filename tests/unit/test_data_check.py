"""What `check` tells people: what is missing, and how many of a thing there are."""

from pathlib import Path

import pytest
from layouts import opened, write_yolo

from visiontrain.core.errors import DataError
from visiontrain.data.check import check
from visiontrain.data.defects import counted


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_run_needs_both_splits_and_is_told_how_to_add_one(missing, tmp_path):
    yaml = Path(write_yolo(tmp_path / "set"))
    yaml.write_text(yaml.read_text().replace(f"{missing}: ", "test: "))
    spec = opened(yaml, tmp_path / "cache")
    report = check(spec, list(spec.splits))
    assert not report.trainable
    told = f"{missing}: no such split, and a run needs it; add `{missing}:` to the data set's YAML"
    assert report.lines()[-1] == told


def test_one_of_a_thing_is_not_written_as_many(tmp_path):
    yaml = Path(write_yolo(tmp_path / "set"))
    yaml.write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    for split in ("train", "val"):
        for name in "bcd":
            (tmp_path / f"set/images/{split}/{name}.jpg").unlink()
    spec = opened(yaml, tmp_path / "cache")
    with pytest.raises(DataError, match=r"\(1 defect: 1 class-range\)"):
        spec.table("train")
    first, second = check(spec, ["train"]).lines()[:2]
    assert first.endswith(": yolo, 1 class")
    assert second.startswith("train: 1 image, 1 box, 0 images without a box, ")
    for labels in (tmp_path / "set/labels/train").iterdir():
        labels.unlink()
    with pytest.raises(DataError, match="no box in 1 image;"):
        spec.table("train")
    assert [counted(n, "box") for n in (0, 1, 2000)] == ["0 boxes", "1 box", "2,000 boxes"]
