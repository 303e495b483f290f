"""What predict reads and writes, without a model."""

import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.types import Detections
from visiontrain.data.inputs import Input, find_inputs, frame_rate, read_frames
from visiontrain.engine.pictures import batches
from visiontrain.predict_config import PredictConfig
from visiontrain.prediction import prepare_prediction
from visiontrain.report.detections import (
    Film,
    coco_rows,
    image_row,
    write_json,
    write_picture,
    yolo_lines,
)
from visiontrain.report.draw import colour_of, draw_boxes
from visiontrain.report.predictions import stems

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
    for number in range(3):
        film.add(np.zeros((48, 64, 3), np.uint8), found(), NAMES, number)
    film.close()
    assert (frame_rate(path), len(list(read_frames(path, 1)))) == (10, 3)
    row = image_row(path.name, (64, 48), found(), NAMES)
    write_json(tmp_path / "x.json", row)
    assert json.loads((tmp_path / "x.json").read_text()) == row


def test_film_has_every_frame_and_reads_back(tmp_path):
    film = Film(tmp_path / "sub" / "tour.mov", 10.0)
    for level in range(12):
        film.add(np.full((48, 64, 3), level * 20, np.uint8), found(), NAMES, level)
    film.close()
    path = tmp_path / "sub" / "tour.mp4"
    assert frame_rate(path) == 10
    frames = list(read_frames(path, 5))
    assert [number for number, _ in frames] == [0, 5, 10]
    assert [int(pixels.mean() / 20 + 0.5) for _, pixels in frames] == [0, 5, 10]


def test_a_film_of_larger_frames_than_are_allowed_is_not_decoded(tmp_path):
    write_film(tmp_path / "film.avi", 3)
    assert len(list(read_frames(tmp_path / "film.avi", 1, 64 * 48))) == 3
    with pytest.raises(DataError, match=r"film.avi: frames of 3,072 pixels, over max_pixels=3,071"):
        next(read_frames(tmp_path / "film.avi", 1, 64 * 48 - 1))


def test_a_stride_of_frames_without_a_film_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    config = PredictConfig(weights="any", source=str(tmp_path), vid_stride=5)
    with pytest.raises(ConfigError, match="vid_stride: 5; there is no film, leave it out"):
        prepare_prediction(config)


def write_film(path, count=40):
    """Write a film of frames that are hard to compress."""
    code = {".avi": "MJPG", ".mp4": "mp4v"}[path.suffix]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 25, (64, 48))
    for number in range(count):
        random = np.random.default_rng(number)
        writer.write(random.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize(("name", "zeros", "last"), [("a.mp4", 0.2, 39), ("a.avi", 0.6, 16)])
def test_damage_in_a_film_is_told_and_is_not_its_end(name, zeros, last, tmp_path, capfd):
    """A fifth in the middle is damaged, or all after two fifths."""
    path = write_film(tmp_path / name)
    assert [number for number, _ in read_frames(path, 1)] == list(range(40))
    data = path.read_bytes()
    begin, end = int(0.4 * len(data)), int((0.4 + zeros) * len(data))
    path.write_bytes(data[:begin] + bytes(end - begin) * (end < len(data) - 1) + data[end:])
    numbers = []

    def take():
        for number, _ in read_frames(path, 1):
            numbers.append(number)

    with pytest.raises(DataError, match=rf"{name}: \d+ of 40 frames can be read; the rest is dam"):
        take()
    assert 10 <= len(numbers) < 40
    assert abs(numbers[-1] - last) <= 3
    assert capfd.readouterr().out == ""  # FFmpeg says so on stderr, too


def test_a_name_with_a_colon_is_no_protocol(tmp_path, monkeypatch):
    write_film(tmp_path / "a.avi", 3).rename(tmp_path / "11:12.avi")
    monkeypatch.chdir(tmp_path)
    assert len(list(read_frames(Path("11:12.avi"), 1))) == 3


@pytest.mark.parametrize(("rate", "read"), [(29.97, 29.97), (119.983, 120), (0, 25)])
def test_rates_are_such_as_mp4_takes(rate, read, monkeypatch):
    monkeypatch.setattr(cv2.VideoCapture, "get", lambda self, key: rate)
    assert frame_rate(Path("a.mp4")) == pytest.approx(read)


def test_frames_beside_their_film_keep_their_labels():
    inputs = [Input(Path(name), name) for name in ("clip/000000.jpg", "clip.mp4", "other.mp4")]
    assert stems(inputs) == ["clip/000000", "clip.mp4", "other"]


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


def test_pictures_are_taken_from_an_iterator_a_batch_at_a_time():
    taken = []

    def frames():
        for number in range(5):
            taken.append(number)
            yield np.full((2, 2, 3), number, np.uint8)

    found = batches(frames(), 2)
    assert [int(picture[0, 0, 0]) for picture in next(found)] == [0, 1]
    assert taken == [0, 1]  # no list of a film's frames would fit
    assert [[int(p[0, 0, 0]) for p in part] for part in found] == [[2, 3], [4]]


def test_red_is_red_in_films_that_are_read_and_written(tmp_path):
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 220
    film = Film(tmp_path / "ours.mp4", 10.0)
    code = cv2.VideoWriter.fourcc(*"MJPG")
    theirs = cv2.VideoWriter(str(tmp_path / "theirs.avi"), code, 10, (64, 48))
    for number in range(3):
        film.add(red, found(), NAMES, number)
        theirs.write(red[..., ::-1].copy())  # OpenCV's blue comes first
    film.close()
    theirs.release()
    for name in ("theirs.avi", "ours.mp4"):
        for _, pixels in read_frames(tmp_path / name, 1):
            assert pixels[..., 0].min() > 150
            assert pixels[..., 1:].max() < 60
