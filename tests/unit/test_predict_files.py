"""What predict reads and writes, without a model."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from visiontrain.core.errors import DataError
from visiontrain.core.types import Detections
from visiontrain.data.inputs import find_inputs, frame_rate, read_frames
from visiontrain.report.detections import (
    Film,
    coco_rows,
    image_row,
    write_json,
    write_picture,
    yolo_lines,
)
from visiontrain.report.draw import colour_of, draw_boxes

NAMES = ("cell", "platelet")


def found(*boxes, label=0):
    count = len(boxes)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(count, 4),
        torch.linspace(0.9, 0.5, count),
        torch.full((count,), label),
    )


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_folder_is_walked_sorted_without_hidden_and_foreign_files(tmp_path):
    touch(tmp_path, "b.PNG", "a/z.jpg", "a/b.jpg", "c.mp4", "notes.txt", ".x.jpg", ".cache/y.jpg")
    inputs = find_inputs(str(tmp_path))
    assert [item.name for item in inputs] == ["a/b.jpg", "a/z.jpg", "b.PNG", "c.mp4"]
    assert [item.is_video for item in inputs] == [False, False, False, True]


def test_glob_is_named_from_the_common_folder(tmp_path):
    touch(tmp_path, "d/one/a.jpg", "d/two/a.jpg", "d/two/b.txt")
    names = [item.name for item in find_inputs(str(tmp_path / "**" / "*.*"))]
    assert names == ["one/a.jpg", "two/a.jpg"]


def test_a_file_of_any_suffix_is_taken_also_with_glob_letters_in_its_name(tmp_path):
    touch(tmp_path, "scan[1].raw")
    assert [i.name for i in find_inputs(str(tmp_path / "scan[1].raw"))] == ["scan[1].raw"]


@pytest.mark.parametrize(("source", "side"), [("digits", 160), ("tiny", 128)])
def test_a_data_set_that_ships_whole_gives_scenes_unless_there_is_such_a_folder(
    source, side, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    inputs = find_inputs(source)
    assert [item.name for item in inputs] == [f"digits/test/00000{n}.png" for n in range(8)]
    read = [images.read(row) for images, row in (item.scene for item in inputs)]
    assert {picture.shape for picture in read} == {(side, side, 3)}
    assert len({picture.tobytes() for picture in read}) == 8
    touch(tmp_path, f"{source}/a.jpg")
    assert [item.name for item in find_inputs(source)] == ["a.jpg"]
    with pytest.raises(DataError, match=r"no file or folder 'bccd'; .*or digits or tiny"):
        find_inputs("bccd")  # it may have no test split, and lies where it was put


@pytest.mark.parametrize("source", ["absent.jpg", "*.jpg", "."])
def test_nothing_to_read_is_one_line(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "notes.txt")
    with pytest.raises(DataError, match=r"^source: no .*; ") as caught:
        find_inputs(source)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_name_that_is_no_utf8_is_read_and_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xb9\xb7.mp4")
    film = Film(path, 10.0)  # OpenCV ends the process when it gets the name as text
    for _ in range(3):
        film.add(np.zeros((48, 64, 3), np.uint8), found(), NAMES)
    film.close()
    assert (frame_rate(path), len(list(read_frames(path, 1)))) == (10, 3)
    row = image_row(path.name, (64, 48), found(), NAMES)
    write_json(tmp_path / "x.json", row)
    assert json.loads((tmp_path / "x.json").read_text()) == row


def test_film_has_every_frame_and_reads_back(tmp_path):
    film = Film(tmp_path / "sub" / "tour.mov", 10.0)
    for level in range(12):
        film.add(np.full((48, 64, 3), level * 20, np.uint8), found(), NAMES)
    film.close()
    path = tmp_path / "sub" / "tour.mp4"
    assert frame_rate(path) == 10
    frames = list(read_frames(path, 5))
    assert [number for number, _ in frames] == [0, 5, 10]
    assert [int(pixels.mean() / 20 + 0.5) for _, pixels in frames] == [0, 5, 10]


def test_broken_video_is_a_data_error(tmp_path, capfd):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"no video at all")
    with pytest.raises(DataError, match=r"broken\.mp4: not a video"):
        list(read_frames(path, 1))


def test_boxes_are_drawn_in_the_colour_of_their_class_and_nowhere_else():
    pixels = np.full((200, 300, 3), 128, np.uint8)
    drawn = draw_boxes(pixels, found((100, 50, 200, 150), label=1), NAMES)
    assert (pixels == 128).all()  # a copy
    assert tuple(drawn[150, 150]) == tuple(drawn[100, 100]) == colour_of(1)
    assert (drawn[60:140, 110:190] == 128).all()
    assert (drawn[:, 210:] == 128).all()
    assert colour_of(0) != colour_of(1)


def test_labels_stay_inside_the_picture():
    pixels = np.zeros((60, 80, 3), np.uint8)
    corner = draw_boxes(pixels, found((60, 0, 79, 59)), ["a long name at the right edge"])
    assert corner[:, :40].any()  # moved left until it fits, or as far as that goes


def test_rows_in_every_format_say_the_same(tmp_path):
    boxes = found((10, 20, 30, 60), (0, 0, 100, 200), label=1)
    row = image_row("a/b.jpg", (100, 200), boxes, NAMES)
    assert row["boxes"][0] == {
        **{"box": [10, 20, 30, 60], "score": 0.9, "class": 1, "name": "platelet"}
    }
    results = coco_rows([image_row("none.jpg", (5, 5), found(), NAMES), row])
    assert [r["bbox"] for r in results] == [[10, 20, 20, 40], [0, 0, 100, 200]]
    assert {(r["image_id"], r["file_name"]) for r in results} == {(1, "a/b.jpg")}
    assert yolo_lines((100, 200), boxes) == [
        "1 0.200000 0.200000 0.200000 0.200000 0.900000",
        "1 0.500000 0.500000 1.000000 1.000000 0.500000",
    ]
    write_json(tmp_path / "x.json", row)
    assert json.loads((tmp_path / "x.json").read_text()) == row


def test_pictures_of_odd_kinds_are_written_as_jpeg(tmp_path):
    write_picture(tmp_path / "a.jp2", np.zeros((9, 7, 3), np.uint8), found(), NAMES)
    with Image.open(tmp_path / "a.jp2.jpg") as picture:
        assert picture.size == (7, 9)
