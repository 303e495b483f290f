"""predict: the same numbers as evaluation, everything written, nothing fatal in one bad file."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import visiontrain
from visiontrain.commands import predict
from visiontrain.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    OutOfMemoryError,
)
from visiontrain.core.types import Detections
from visiontrain.data.dataset import EvalSet
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.inputs import read_frames
from visiontrain.data.loader import eval_batches
from visiontrain.data.table import Table
from visiontrain.data.walk import walk
from visiontrain.engine.detector import Detector
from visiontrain.engine.pictures import batches
from visiontrain.engine.weights import WeightsMeta, load_weights, save_weights
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.predict_config import DetectorConfig, PredictConfig
from visiontrain.prediction import Predicted, load
from visiontrain.report.detections import Film, image_row
from visiontrain.tasks.config import DetectConfig

SIZES = ((90, 50), (64, 64), (40, 120))  # width, height
NAMES = ["cell", "platelet", "dust"]


def untrained(folder, config):
    torch.manual_seed(0)
    model = build_model(config, len(NAMES))
    meta = WeightsMeta(
        task="detect",
        model=config.model_dump(),
        names=NAMES,
        imgsz=64,
        task_config=DetectConfig().model_dump(),
    )
    save_weights(folder / "weights" / "best.safetensors", meta, dict(model.state_dict()))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run folder with weights that know nothing, but are the same every time."""
    return untrained(tmp_path_factory.mktemp("run"), YoloN())


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 255, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def anything(weights, **keys):
    return load(DetectorConfig(weights=str(weights), conf=0.0, max_det=20, **keys))


def table_of(paths):
    count = len(paths)
    return Table(
        names=tuple(NAMES),
        images=FileImages(Paths(paths), 10_000),
        sizes=np.array(SIZES, np.int32),
        offsets=np.zeros(count + 1, np.int64),
        boxes=np.empty((0, 4), np.float32),
        classes=np.empty(0, np.int32),
        crowd=np.empty(0, np.bool_),
        difficult=np.empty(0, np.bool_),
        area=np.empty(0, np.float32),
    )


def test_predicts_what_evaluation_sees(weights, pictures):
    detector = anything(weights)
    paths = sorted(pictures.iterdir())
    (batch,) = eval_batches(EvalSet(table_of(paths), 64), 3, (0, 1), 0)
    placed = batch.to(torch.device("cpu"))
    with torch.no_grad():
        expected = detector.task.decode(detector.model(placed.images), placed)
    found = detector.predict(paths)
    for mine, theirs, (width, height) in zip(found, expected, SIZES, strict=True):
        assert len(mine.boxes) == 20
        assert torch.equal(mine.boxes, theirs.boxes)
        assert torch.equal(mine.scores, theirs.scores)
        assert mine.names == tuple(NAMES[k] for k in theirs.classes.tolist())
        assert mine.boxes.amin() >= 0
        assert mine.boxes.amax(0)[2] <= width
        assert mine.boxes.amax(0)[3] <= height


def test_paths_and_arrays_one_or_many_in_any_batches_agree(weights, pictures):
    detector = anything(weights, device="cpu")
    paths = sorted(pictures.iterdir())
    arrays = [np.asarray(Image.open(path)) for path in paths]
    many = detector.predict(arrays, batch=2)
    one = [detector.predict(str(path))[0] for path in paths]
    assert [len(detector.predict(array)) for array in arrays] == [1, 1, 1]
    for a, b in zip(many, one, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
    assert detector.predict([]) == []


def test_the_keys_of_a_detector_count(weights, pictures):
    paths = sorted(pictures.iterdir())
    assert [len(d.boxes) for d in load(DetectorConfig(weights=str(weights))).predict(paths)] == [
        *(0, 0, 0)  # an untrained model is never 25% sure
    ]
    few = load(DetectorConfig(weights=str(weights), conf=0.0, max_det=2, imgsz=96))
    assert few.imgsz == 96
    assert [len(d.boxes) for d in few.predict(paths)] == [2, 2, 2]


def test_an_overlap_counts_where_detections_are_merged(weights, pictures, tmp_path):
    config = PredictConfig(weights=str(weights), source=str(pictures), iou=0.1, conf=0.0)
    for call in (
        lambda: predict(config, print),
        lambda: visiontrain.load(weights, iou=0.1),
    ):
        with pytest.raises(ConfigError, match=r"^iou: 0\.1; it changes nothing without nms; add "):
            call()
    merging = untrained(tmp_path / "merging", YoloN(head="nms"))  # whether asked to or not
    few, many = (
        visiontrain.load(merging, iou=iou, conf=0.0).predict(pictures / "0.png")[0]
        for iou in (0.1, 0.9)
    )
    assert len(few.boxes) < len(many.boxes)
    out = str(tmp_path / "o")
    told = predict(config.model_copy(update={"weights": str(merging), "out": out}), lambda _: None)
    assert len(told.rows[0]["boxes"]) == len(few.boxes)
    with pytest.raises(ConfigError, match=r"^nms: false; this model has no scores without"):
        visiontrain.load(merging, nms=False)


def test_large_files_are_refused_unless_they_are_allowed(weights, pictures):
    path = pictures / "0.png"  # of 90 x 50 pixels
    detector = visiontrain.load(weights, max_pixels=4499)
    with pytest.raises(DataError, match="90 x 50 is more than max_pixels=4499"):
        detector.predict(path)
    assert len(visiontrain.load(weights, max_pixels=4500).predict(path)) == 1
    assert len(detector.predict(np.asarray(Image.open(path)))) == 1  # in memory already


@pytest.mark.parametrize(
    ("picture", "got"),
    [
        (np.zeros((8, 8), np.uint8), r"images\[0\]: an array \(8, 8\) of uint8; "),
        (np.zeros((0, 8, 3), np.uint8), r"images\[0\]: an array \(0, 8, 3\) of uint8; "),
        (np.zeros((8, 0, 3), np.uint8), r"images\[0\]: an array \(8, 0, 3\) of uint8; "),
        (np.zeros((8, 8, 3), np.float32), r"images\[0\]: an array \(8, 8, 3\) of float32; "),
        ("absent.jpg", r"absent\.jpg: "),
    ],
)
def test_what_is_no_picture_is_named(weights, picture, got):
    with pytest.raises(DataError, match=got):
        anything(weights).predict(picture)


def test_one_run_leaves_everything_and_names_what_it_left_out(weights, pictures, tmp_path, capfd):
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (pictures / "clip.mp4").write_bytes(b"no video")
    film = Film(pictures / "tour.mp4", 5.0)
    nothing = replace(anything(weights).predict(np.zeros((9, 9, 3), np.uint8))[0], names=())
    for number in range(4):
        film.add(np.zeros((48, 64, 3), np.uint8), nothing, NAMES, number)
    film.close()
    said = []
    config = PredictConfig(
        weights=str(weights),
        source=str(pictures),
        project=str(tmp_path / "runs"),
        conf=0.0,
        max_det=3,
        batch=4,
        vid_stride=2,
        save_txt=True,
        save_json=True,
    )
    result = predict(config, said.append)
    assert result.folder == tmp_path / "runs" / "detect" / "predict"
    names = ["0.png", "1.png", "2.png", "tour.mp4#000000", "tour.mp4#000002"]
    assert [row["file_name"] for row in result.rows] == names
    assert [line.split(":")[0] for line in said[:2]] == ["left out", "left out"]
    assert said[2].startswith("5 images, 2 unreadable left out, 15 objects, ")
    assert said[2].endswith(f" images/s: {result.folder}")
    content = json.loads((result.folder / "predictions.json").read_text())
    assert content["images"] == result.rows
    assert [(row["width"], row["height"]) for row in result.rows[:3]] == list(SIZES)
    assert len(json.loads((result.folder / "detections.json").read_text())) == 15
    written = {p.relative_to(result.folder).as_posix() for p in result.folder.rglob("*.*")}
    assert written == {
        *("predictions.json", "detections.json", "metrics.json", "images/tour.mp4"),
        *(f"images/{i}.png" for i in range(3)),
        *(f"labels/{i}.txt" for i in range(3)),
        *("labels/tour/000000.txt", "labels/tour/000002.txt"),
    }
    again = predict(config.model_copy(update={"save": False}), said.append)
    assert again.folder.name == "predict-2"
    assert again.rows == result.rows
    assert not (again.folder / "images").exists()


def test_what_was_found_before_a_crash_is_there(weights, pictures, tmp_path, monkeypatch):
    keys = {"weights": str(weights), "source": str(pictures), "conf": 0.0, "max_det": 3, "batch": 1}
    whole = predict(PredictConfig(**keys, out=str(tmp_path / "whole")), lambda _: None)
    looked = Detector.detect

    def dies_at_the_third(self, images, batch):
        if images[0].shape[:2] == SIZES[2][::-1]:
            raise MemoryError
        return looked(self, images, batch)

    monkeypatch.setattr(Detector, "detect", dies_at_the_third)
    out = tmp_path / "pictures" / "crashed"
    with pytest.raises(OutOfMemoryError):
        predict(PredictConfig(**keys, out=str(out)), lambda _: None)
    lines = (out / "predictions.part0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == whole.rows[:2]
    assert len(list(walk(pictures))) == len(SIZES)  # what it drew there is no data
    assert not [*whole.folder.glob("*part*")]


def test_nothing_found_says_how_near_the_best_came(weights, pictures, tmp_path):
    anyhow = anything(weights).predict(sorted(pictures.iterdir()))
    best = max(float(found.scores[0]) for found in anyhow)
    said = []
    config = PredictConfig(weights=str(weights), source=str(pictures), out=str(tmp_path / "a"))
    result = predict(config, said.append)
    assert (result.objects, result.best) == (0, pytest.approx(best))
    told = f"3 images, 0 objects above conf=0.25 (the best score was {best:.2g}), "
    assert said[0].startswith(told)
    one = {"conf": 0.0, "max_det": 1, "source": str(pictures / "0.png"), "out": str(tmp_path / "b")}
    predict(config.model_copy(update=one), said.append)
    assert said[1].startswith("1 image, 1 object, ")


@pytest.mark.parametrize("keys", [{}, {"nms": True, "iou": 0.3}, {"tile": 64, "overlap": 0.5}])
def test_what_is_found_does_not_depend_on_what_is_below(keys, weights, pictures, tmp_path):
    paths = sorted(pictures.iterdir())
    scores = anything(weights).predict(paths[0])[0].scores
    keys = {**keys, "conf": float(scores[5]), "max_det": 20, "weights": str(weights)}
    expected = load(DetectorConfig(**keys)).predict(paths)
    config = PredictConfig(**keys, source=str(pictures), out=str(tmp_path / "o"), batch=1)
    rows = predict(config, lambda _: None).rows
    assert 1 <= len(rows[0]["boxes"]) <= (20 if "tile" in keys else 6)
    for row, found in zip(rows, expected, strict=True):
        assert row == image_row(row["file_name"], (row["width"], row["height"]), found, NAMES)


def test_scenes_of_digits_are_predicted_on(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = predict(
        PredictConfig(weights=str(weights), source="digits", out="o", save_txt=True), lambda _: None
    )
    assert [(row["width"], row["height"]) for row in result.rows] == [(160, 160)] * 8
    for row in result.rows:
        with Image.open(tmp_path / "o/images" / row["file_name"]) as picture:
            assert picture.format == "PNG"
    assert len(list((tmp_path / "o/labels/digits/test").iterdir())) == 8


def test_two_pictures_of_one_stem_keep_two_label_files(weights, pictures, tmp_path):
    Image.open(pictures / "0.png").save(pictures / "0.bmp")
    config = PredictConfig(
        weights=str(weights), source=str(pictures / "0.*"), out=str(tmp_path / "o"), save_txt=True
    )
    predict(config, lambda _: None)
    assert sorted(p.name for p in (tmp_path / "o" / "labels").iterdir()) == ["0.png.txt", "0.txt"]


def write_video(path, frames):
    film = Film(path.with_suffix(".mp4"), 5.0)
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    for number in range(frames):
        film.add(np.zeros((48, 64, 3), np.uint8), nothing, NAMES, number)
    film.close()
    path.with_suffix(".mp4").rename(path)


def test_videos_of_one_stem_keep_their_own_files(weights, tmp_path):
    folder = tmp_path / "videos"
    for name, frames in (("tour.mp4.avi", 1), ("tour.avi", 2), ("tour.mkv", 4), ("tour.mp4", 3)):
        write_video(folder / name, frames)
    config = PredictConfig(
        weights=str(weights), source=str(folder), out=str(tmp_path / "o"), save_txt=True
    )
    assert len(predict(config, lambda _: None).rows) == 10
    films = {"tour": 2, "tour.mkv": 4, "tour.mp4": 3, "tour.mp4.avi": 1}
    for name, frames in films.items():
        assert len(list(read_frames(tmp_path / f"o/images/{name}.mp4", 1))) == frames
        assert len(list((tmp_path / "o/labels" / name).iterdir())) == frames
    assert {path.name for path in (tmp_path / "o/labels").iterdir()} == set(films)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_names_that_are_no_utf8_are_predicted_on_and_told(weights, pictures, tmp_path):
    (pictures / "0.png").rename(pictures / os.fsdecode(b"\xb9.png"))
    (pictures / os.fsdecode(b"\xba.png")).write_bytes(b"broken")
    said = []
    config = PredictConfig(
        weights=str(weights), source=str(pictures), out=str(tmp_path / "o"), save_json=True
    )
    result = predict(config, said.append)
    content = json.loads((tmp_path / "o/predictions.json").read_text())
    assert content["images"] == result.rows
    assert [row["file_name"] for row in result.rows] == ["1.png", "2.png", "\udcb9.png"]
    assert "\n".join(said).encode()  # any terminal takes it
    assert said[0].startswith("left out: ")
    assert "\\udcba.png" in said[0]


def test_nothing_readable_is_an_error(weights, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    said = []
    config = PredictConfig(
        weights=str(weights), source=str(tmp_path / "a.jpg"), out=str(tmp_path / "out")
    )
    with pytest.raises(DataError, match=r"nothing in .* could be read"):
        predict(config, said.append)
    assert len(said) == 1


def test_weights_that_do_not_fit_and_devices_that_do_not_exist(weights, tmp_path):
    good = load_weights(weights)
    meta = replace(good.meta, names=NAMES[:2])
    save_weights(tmp_path / "bad.safetensors", meta, good.tensors)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors does not fit the model it names"):
        load(DetectorConfig(weights=str(tmp_path / "bad.safetensors")))
    for task_config, told in (({"future": 1}, "future: extra"), ({"box": "x"}, "box: input")):
        save_weights(
            tmp_path / "newer.safetensors",
            replace(good.meta, task_config={**good.meta.task_config, **task_config}),
            good.tensors,
        )
        with pytest.raises(CheckpointError, match=rf"newer\.safetensors: task_config\.{told}"):
            load(DetectorConfig(weights=str(tmp_path / "newer.safetensors")))
    with pytest.raises(ConfigError, match="device: "):
        load(DetectorConfig(weights=str(weights), device="cuda:99"))
    with pytest.raises(ConfigError, match="device: cpu,cpu; one model is loaded onto one device"):
        load(DetectorConfig(weights=str(weights), device="cpu,cpu"))


@pytest.mark.parametrize("share", ["one", "all"])
def test_weights_that_are_no_numbers_do_not_find_nothing(share, weights, pictures, tmp_path):
    good = load_weights(weights)
    key = next(name for name in good.tensors if name.startswith("blocks.stem"))
    broken = good.tensors[key].clone()
    broken.view(-1)[slice(None) if share == "all" else 0] = torch.nan
    save_weights(tmp_path / "nan.safetensors", good.meta, {**good.tensors, key: broken})
    with pytest.raises(DivergedError, match="prediction: a score or a box is not finite; the w"):
        load(DetectorConfig(weights=str(tmp_path / "nan.safetensors"))).predict(pictures / "0.png")


def test_deep_pictures_of_pil_are_seen_as_their_files_are(tmp_path):
    deep = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as picture:
        ((of_pil,),) = batches(picture, 1)
    ((of_file,),) = batches(tmp_path / "deep.png", 1)
    assert np.abs(of_pil.astype(int) - of_file).max() <= 1  # halves are rounded
    assert of_file.std() > 50
    for kind, mode in ((np.int32, "I"), (np.float32, "F")):
        with pytest.raises(DataError, match=rf"images\[0\]: PIL's mode {mode}, whose white is"):
            list(batches(Image.fromarray(deep.astype(kind)), 1))


def scored(name, score):
    others = [{"name": "other", "score": 0.0, "class": 1}]
    return {"classes": [{"name": name, "score": score, "class": 0}, *others]}


def test_the_last_line_says_what_whole_images_show(tmp_path):
    one = Predicted(tmp_path, [scored("cat", 0.934)], [], seconds=1.0)
    assert one.summary().startswith("1 image, cat (score 0.93), 1.0 images/s: ")
    names = [name for count, name in enumerate("gfedcba", start=1) for _ in range(count)]
    many = Predicted(tmp_path, [scored(name, 0.5) for name in names], ["broken"], seconds=1.0)
    said = "28 images, 1 unreadable left out, 7 a, 6 b, 5 c, 4 d, 3 e, 3 of others, 28.0 images/s: "
    assert many.summary().startswith(said)
