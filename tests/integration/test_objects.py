"""Objects of a user's own through whole runs: in every mode, at a resume, in use."""

import json
import shutil

import numpy as np
import pytest
from torch import nn
from torch.nn import functional

import visiontrain as vt
from visiontrain import commands
from visiontrain.core.config import from_keys
from visiontrain.core.own import taken_apart
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.prepare import below
from visiontrain.recipe import Run

SMALL = {"batch": 6, "imgsz": 32, "device": "cpu", "workers": 0}
QUIET = {"log": {"to": [], "plots": False}}


class Tints:
    """Pictures that are reddish, greenish or bluish."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, index))
        label = int(random.integers(3))
        image = random.integers(0, 160, (40, 36, 3), np.uint8)
        image[..., label] += 80
        return vt.Sample(image, label)


class Squares(Tints):
    """Pictures with one bright square."""

    def __getitem__(self, index):
        random = np.random.default_rng((self.seed, index))
        image = random.integers(0, 60, (64, 64, 3), np.uint8)
        x, y = random.integers(0, 40, 2).tolist()
        image[y : y + 20, x : x + 20] = 220
        return vt.Sample(image, [0], [[x, y, x + 20, y + 20]])


def net(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def net_elsewhere(classes):
    """Return what `net` does, under another name, as after moving it."""
    return net(classes)


def detector(classes):
    return build_model(YoloN(norm="group"), classes)


def loss(logits, batch):
    return functional.cross_entropy(logits, batch.targets[:, 0, 0].long(), reduction="none")


def loss_of_detectors(outputs, batch):
    distances, many, one = outputs
    return (distances - 1).square().mean((1, 2)) + many.square().mean((1, 2)) + one.mean((1, 2))


def noisy(sample, random):
    """Every draw changes the pixels, so that other draws would be noticed."""
    noise = random.integers(0, 30, sample.image.shape, np.uint8)
    return vt.Sample(sample.image // 2 + noise, sample.classes, sample.boxes)


TINTS = vt.Data(Tints(20, 0), Tints(7, 1), ["red", "green", "blue"])
SQUARES = vt.Data(Squares(10, 0), Squares(5, 1), ["square"])


def measured(mode):
    """Return whether a mode trains what users bring as one device does."""
    keys = {"data": TINTS, "model": net, "loss": loss, "augment": noisy}
    more = {"task": "classify", "strategy": {"kind": mode, "processes": 2}, "accumulate": 2}
    run = from_keys(Run, taken_apart(SMALL | keys | more | {"epochs": 2}), below=below)
    return commands.parity(run, 6, ("fp64",))


def test_what_users_bring_is_one_devices_in_processes_that_are_started():
    report = measured("ddp")
    assert report.verdict == "exact", report.reasons


@pytest.mark.usefixtures("living")
def test_what_users_bring_is_one_devices_in_shards():
    report = measured("fsdp")
    assert report.verdict == "exact", report.reasons


@pytest.mark.usefixtures("living")
def test_a_detector_of_ones_own_is_one_devices_in_a_pipeline(caplog):
    keys = {"data": SQUARES, "model": detector, "loss": loss_of_detectors, "augment": noisy}
    mode = {"kind": "pipeline", "processes": 2, "memory": 64}
    more = {"strategy": mode, "batch": 4, "epochs": 2}
    run = from_keys(Run, taken_apart(SMALL | {"imgsz": 64} | keys | more), below=below)
    report = commands.parity(run, 3, ("fp64",))
    assert report.verdict == "exact", report.reasons
    assert "strategy.memory: it changes no result, and parity cuts without it" in caplog.messages


def test_a_run_with_objects_goes_on_and_its_weights_are_used(tmp_path):
    rows = []

    def note(row, step):
        rows.append((step, row["val/top1"]))

    out = tmp_path / "run"
    objects = {"data": TINTS, "model": net, "loss": loss, "augment": noisy, "logger": note}
    vt.train(**objects, **SMALL, **QUIET, epochs=2, out=out)
    with pytest.raises(
        vt.ConfigError, match=r"data=visiontrain.Data\(Tints\(...\), ...\), augment=noisy"
    ):
        vt.train(out=out, resume=True, epochs=3)
    run = vt.train(**objects, out=out, resume=True, epochs=3)
    assert [step for step, _ in rows] == [4, 8, 12]
    assert run.config.data.source == "test_objects:Tints"
    assert json.loads((out / "weights/best.json").read_text())["task_config"]["loss"] == {
        "kind": "object",
        "ref": "test_objects:loss",
    }
    moved = objects | {"model": net_elsewhere, "data": vt.Data(TINTS.train, TINTS.val, TINTS.names)}
    assert vt.train(**moved, out=out, resume=True, epochs=3).metrics["top1"] == run.metrics["top1"]
    again = vt.val(weights=out, data=TINTS, model=net, out=tmp_path / "val", log={"plots": False})
    assert again.metrics["top1"] == run.metrics["top1"]
    with pytest.raises(vt.ConfigError, match=r"visiontrain.load\(WEIGHTS, model=net\)"):
        vt.load(out)
    picture = TINTS.val[0].image
    (found,) = vt.load(out, model=net, device="cpu").predict([picture])
    assert found.names == ("red", "green", "blue")


def test_a_comparison_cannot_vary_objects():
    for entry in ({"model": net}, {"loss": loss}, {"augment": noisy}):
        with pytest.raises(vt.ConfigError, match=r"runs: .* is an object, and one for all runs"):
            vt.compare(runs=[entry, {}], data=TINTS, model=net)


def test_weights_of_one_class_are_scored_as_such(tmp_path):
    data = vt.Data(Squares(10, 0), Squares(5, 1), ["square"])
    keys = SMALL | {"imgsz": 64, "epochs": 1, "data.val_images": 3, "data.single_cls": True}
    run = vt.train(data=data, model="yolo_n", out=tmp_path / "run", **keys, log={"to": []})
    scored = vt.val(weights=run.folder, data=data, out=tmp_path / "val", log={"plots": False})
    assert (scored.metrics["names"], scored.metrics["images"]) == (["object"], 5)  # no cap


def two_files(weights, folder):
    """Copy weights away from their run."""
    return shutil.copy(weights, folder / "alone.safetensors")


@pytest.mark.usefixtures("living")
def test_tiles_are_trained_on_and_images_scored(tmp_path):
    """Scores, files and pictures are of whole images, on any number of processes."""
    keys = {"data": SQUARES, "epochs": 1, "tile": 32, "overlap": 0.25}
    settings = {"data.tile": keys.pop("tile"), "data.overlap": keys.pop("overlap")}
    run = vt.train(
        **keys, **SMALL, save_json=True, out=tmp_path / "run", log={"to": []}, **settings
    )
    assert run.metrics["samples"] == 10 * 9  # three rows of three tiles
    assert run.metrics["images"] == 5
    shown = json.loads((run.folder / "detections.json").read_text())
    assert {row["image_id"] for row in shown} <= set(range(5))
    assert max(row["bbox"][0] + row["bbox"][2] for row in shown) > 40  # of the whole image
    two = vt.val(
        weights=run.folder,
        data=SQUARES,
        strategy={"kind": "ddp", "processes": 2, "threads": 1},
        out=tmp_path / "val",
        log={"plots": False},
    )
    assert two.config.data.tile == 32
    other = vt.Data(Squares(5, 0), Squares(3, 2), ["square"])
    keys = {"data": other, "log": {"plots": False}, "out": tmp_path / "other"}
    assert vt.val(weights=two_files(run.weights, tmp_path), **keys).config.data.tile == 32
    assert two.metrics["per_class"] == run.metrics["per_class"]
    detector = vt.load(run.folder, conf=0.001, device="cpu")
    assert (detector.tiling.side, detector.tiling.overlap) == (32, 8)
    assert vt.load(run.folder, tile=0, device="cpu").tiling is None
    (found,) = detector.predict([SQUARES.val[0].image])
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
