"""What other tools write around YOLO's and VOC's layouts."""

import os
from pathlib import Path

import pytest
from layouts import PICTURES, opened, write_coco, write_voc, write_yolo

from visiontrain.core.errors import ConfigError
from visiontrain.data.yolo import parse_row


def test_an_export_of_cvat_is_read_as_it_is(tmp_path):
    """Its splits have capitals, and its lists a folder that is not there."""
    folder = tmp_path / "set"
    write_yolo(folder)
    for split in ("train", "val"):
        lines = [f"data/images/{split}/{picture.name}.jpg" for picture in PICTURES]
        (folder / f"{split.title()}.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text(
        "Train: Train.txt\nValidation: Val.txt\npath: .\nnames: [cat, dog]\n"
    )
    spec = opened(folder / "data.yaml", tmp_path / "cache")
    assert len(spec.table("train")) == len(spec.table("val")) == len(PICTURES)
    assert len(spec.table("train").boxes) == 4


@pytest.mark.parametrize("last", [[], ["0.87"], ["3"]])
def test_a_score_or_a_track_behind_a_box_is_passed_over(last):
    fields = ["1", "0.5", "0.5", "0.5", "0.25", *last]
    assert parse_row(fields, (40, 40), 0) == (1.0, (10.0, 15.0, 30.0, 25.0))


@pytest.mark.parametrize("write", [write_yolo, write_coco])
def test_data_lie_beside_what_describes_them_whatever_links_to_it(tmp_path, write):
    place = Path(write(tmp_path / "set"))
    link = tmp_path / f"link{place.suffix}"
    link.symlink_to(place)
    assert len(opened(link, tmp_path / "cache").table("train")) == len(PICTURES)
    # A store of large files: the link's target has nothing beside it.
    store = tmp_path / "store" / "3f"
    store.mkdir(parents=True)
    target = store / f"{'a81c' * 8}{place.suffix}"
    place.rename(target)
    place.symlink_to(target)
    assert len(opened(place, tmp_path / "cache").table("train")) == len(PICTURES)


def test_a_row_of_six_numbers_among_polygons_is_a_part_of_one(tmp_path):
    place = Path(write_yolo(tmp_path / "set"))
    (tmp_path / "set/labels/train/a.txt").write_text(
        "0 0.1 0.1 0.5 0.1 0.5 0.5\n0 0.1 0.1 0.5 0.1 0.5\n"
    )
    table = opened(place, tmp_path / "cache").table("train")
    assert [(d.kind, d.line) for d in table.defects] == [("malformed-row", 2)]


def test_a_split_in_two_capitals_is_refused(tmp_path):
    place = Path(write_yolo(tmp_path / "set"))
    place.write_text(place.read_text() + "Train: images/val\n")
    with pytest.raises(ConfigError, match="a split twice, in other capitals"):
        opened(place, tmp_path / "cache")


def test_pictures_of_voc_may_lie_deeper_under_any_suffix(tmp_path):
    source = write_voc(tmp_path / "set")
    for folder, old, new in (("JPEGImages", ".jpg", ".JPEG"), ("Annotations", ".xml", ".xml")):
        (tmp_path / "set" / folder / "cam 1").mkdir()
        for picture in PICTURES:
            file = tmp_path / "set" / folder / f"{picture.name}{old}"
            file.rename(file.parent / "cam 1" / f"{picture.name}{new}")
    lines = [f"cam 1{os.sep}{picture.name}" for picture in PICTURES]
    (tmp_path / "set/ImageSets/Main/train.txt").write_text("\n".join(lines))
    table = opened(source, tmp_path / "cache").table("train")
    assert len(table) == len(PICTURES)
    assert {Path(table.images.name(row)).parent.name for row in range(len(table))} == {"cam 1"}
