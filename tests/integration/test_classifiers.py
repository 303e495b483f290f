"""Classification as it is used: from a folder to a trained classifier, by Python and by keys."""

import json
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import PICTURES, save, write_folder
from PIL import Image

import visiontrain as vt
from visiontrain.cli import main
from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Views
from visiontrain.core.yaml_loader import load_yaml
from visiontrain.tasks.config import ClassifyConfig

SMALL = {"epochs": 1, "batch": 4, "imgsz": 32, "device": "cpu", "workers": 0, "log": {"to": []}}
TINY = {"kind": "resnet_tiny", "widths": [8, 8, 8]}


def test_digits_are_learned(tmp_path):
    run = vt.train(
        task="classify",
        data="digits",
        out=tmp_path / "run",
        epochs=3,
        workers=0,
        device="cpu",
        model={"kind": "resnet_tiny", "widths": [16, 32, 32]},
        log={"to": [], "plots": False},
    )
    assert run.metrics["task"] == "classify"
    assert run.metrics["images"] == 270
    assert run.metrics["top1"] > 0.7  # by chance 0.1
    assert run.metrics["top5"] > run.metrics["top1"] or run.metrics["top1"] == 1


class Vectors(torch.nn.Module):
    """Normalises vectors, as many heads do: of a single image at any size."""

    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        self.head = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, classes))

    def forward(self, images):
        return self.head(self.body(images))


class Uncopied(torch.nn.Module):
    """Holds a tensor that was computed, as old weight norms do: deepcopy refuses it."""

    def __init__(self, classes):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        self.head = torch.nn.Linear(4, classes)
        self.computed = 2 * self.head.weight

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def test_a_last_batch_of_one_image_trains_where_maps_keep_more_than_one_place(tmp_path):
    """A network of 1 x 1 maps at 32 pixels has no variance to normalise by then."""
    keys = SMALL | {"data": "digits", "task": "classify", "out": tmp_path / "run"}
    keys |= {"data.train_images": 5, "data.val_images": 4}  # in batches of 4
    with pytest.raises(ConfigError, match="last have 1, and at 32 pixels the model's BatchNorm"):
        vt.train(**keys, model="yolo_n")
    told = "last have 1, and at 64 pixels the model's BatchNorm .* another norm in the model$"
    with pytest.raises(ConfigError, match=told):
        vt.train(**keys | {"imgsz": 64}, model=Vectors)
    own = vt.train(**keys | {"out": tmp_path / "own"}, model=Uncopied, val=False)
    assert own.metrics["samples"] == 5
    run = vt.train(**keys, model=TINY)
    assert run.metrics["samples"] == 5


def test_a_folder_of_classes_becomes_a_classifier_that_predicts(tmp_path):
    """Nobody says that it is classification."""
    source = write_folder(tmp_path / "pets")
    run = vt.train(data=source, model=TINY, out=tmp_path / "run", **SMALL)
    assert run.config.task.kind == "classify"
    assert {p.name for p in (run.folder / "plots").iterdir()} == {
        *("results.png", "labels.png", "calibration.png", "confusion_matrix.png"),
        *("confusion_matrix_normalized.png", "examples.png", "train_batch0.png"),
    }
    page = (run.folder / "report.html").read_text()
    assert "Top-1" in page
    assert "What images are taken for (row)" in page
    assert "overlap 0.45" not in page
    again = vt.val(weights=run.folder, save_json=True, out=tmp_path / "val", log={"plots": False})
    assert again.metrics["top1"] == run.metrics["top1"]
    scores = json.loads((tmp_path / "val/scores.json").read_text())
    classifier = vt.load(run.folder, device="cpu")
    for row in scores:
        (found,) = classifier.predict(row["file_name"])
        assert float(found.scores.sum()) == pytest.approx(1)
        assert found.top(1)[0][0] == row["likeliest"][0]
    told = vt.predict(weights=run.folder, source=f"{source}/val/cat", out=tmp_path / "said")
    assert [len(row["classes"]) for row in told.rows] == [2, 2]
    assert (tmp_path / "said/images/a.jpg").is_file()
    check_keys_of_its_task(run.folder, source, tmp_path)
    with pytest.raises(ConfigError, match="save_json: COCO has no results of classes"):
        vt.predict(weights=run.folder, source=source, save_json=True, out=tmp_path / "no")


def check_keys_of_its_task(folder, source, tmp_path):
    """Weights say what they are for; what means nothing to that is refused in use, too."""
    words = ["val", f"weights={folder}", f"out={tmp_path / 'views'}", "plots=false"]
    assert main([*words, "task.flip=true", "task.shift=1"]) == 0
    assert load_yaml((tmp_path / "views/config.yaml").read_text(), "x")["task"]["shift"] == 1
    seen = vt.val(weights=folder, task={"flip": True}, out=tmp_path / "flip", plots=False)
    assert (seen.config.task.kind, seen.config.task.flip) == ("classify", True)
    with pytest.raises(ConfigError, match=r"task.conf: task=classify has no such key; task=detect"):
        vt.val(weights=folder, conf=0.5, out=tmp_path / "no")
    with pytest.raises(ConfigError, match=r"task: detect, but .* is of task=classify; leave"):
        vt.val(detector_s(tmp_path), weights=folder, out=tmp_path / "no")
    for key, value in {"conf": 0.9, "nms": True, "max_det": 1}.items():
        for call in (partial(vt.predict, source=source, out=tmp_path / "no"), vt.load):
            with pytest.raises(ConfigError, match=rf"{key}: {value}; weights that classify whole"):
                call(weights=folder, **{key: value})


def detector_s(folder):
    (folder / "detector.yaml").write_text("task: {kind: detect}\n")
    return folder / "detector.yaml"


def test_names_of_other_tools_reach_what_they_mean(tmp_path):
    source = write_folder(tmp_path / "pets")
    run = vt.train(
        data=source,
        model=TINY,
        out=tmp_path / "run",
        **{"cutmix": 0.5, "erasing": 0.4, "auto_augment": "randaugment", "label_smoothing": 0.2},
        **SMALL,
    )
    changed = run.config.augment
    assert (changed.cutmix, changed.erasing, changed.auto) == (0.5, 0.4, "randaugment")
    assert run.config.task.smoothing == 0.2


def test_a_damaged_picture_is_no_score(tmp_path):
    source = write_folder(tmp_path / "pets")
    (tmp_path / "pets/val/cat/a.jpg").unlink()
    file = save(PICTURES[0], tmp_path / "pets/val/cat", ".png")
    run = vt.train(data=source, model=TINY, out=tmp_path / "run", **SMALL)
    good = vt.val(weights=run.folder, save_json=True, out=tmp_path / "good", plots=False)
    whole = file.read_bytes()
    file.write_bytes(whole[:200] + bytes(200) + whole[400:])  # its chunks are all there
    found = vt.val(weights=run.folder, save_json=True, out=tmp_path / "val", plots=False)
    assert (found.metrics["images"], found.metrics["unreadable"]) == (3, 1)
    rows = json.loads((tmp_path / "val/scores.json").read_text())
    assert rows == json.loads((tmp_path / "good/scores.json").read_text())[1:]
    assert found.metrics["per_class"]["cat"]["images"] == 1
    assert "unreadable" not in good.metrics


RED, BLUE = (0, 2)  # channels


def write_several(root, counts=(48, 16)):
    """Write pictures that are cats where they are red and dogs where they are blue, or both."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        (root / split).mkdir(parents=True)
        lines = ["image,cat,dog"]
        for k in range(count):
            pixels = random.integers(0, 80, (32, 32, 3), np.uint8)
            pixels[..., RED] += 120 * (k % 2)
            pixels[..., BLUE] += 120 * (k // 2 % 2)
            Image.fromarray(pixels).save(root / split / f"{k}.png")
            lines.append(f"{split}/{k}.png,{k % 2},{k // 2 % 2}")
        (root / f"{split}.csv").write_text("\n".join(lines))
    (root / "data.yaml").write_text("format: csv\ntrain: train.csv\nval: val.csv\n")
    return str(root / "data.yaml")


def test_images_of_several_classes(tmp_path):
    source = write_several(tmp_path / "pets")
    keys = SMALL | {"model": TINY, "epochs": 12, "batch": 8}
    run = vt.train(data=source, save_json=True, out=tmp_path / "run", **keys)
    assert run.config.task.several
    assert run.metrics["map"] > 0.95  # by chance 0.5
    assert {name: row["images"] for name, row in run.metrics["per_class"].items()} == {
        "cat": 8,
        "dog": 8,
    }
    rows = json.loads((tmp_path / "run/scores.json").read_text())
    scores = {Path(row["file_name"]).name: row["scores"] for row in rows}
    assert scores["1.png"]["cat"] > scores["1.png"]["dog"]
    assert scores["2.png"]["cat"] < scores["2.png"]["dog"]
    (found,) = vt.load(run.folder, device="cpu").predict(tmp_path / "pets/val/1.png")
    named = dict(zip(found.names, found.scores.tolist(), strict=True))
    assert named == pytest.approx(scores["1.png"], abs=2e-6)  # of six digits
    with pytest.raises(ConfigError, match=r"task.several: false, but images of the data set have"):
        vt.train(data=source, model=TINY, task={"several": False}, out=tmp_path / "no", **SMALL)


def test_images_of_one_class_may_be_learned_as_if_of_several(tmp_path):
    one = vt.train(
        data=write_folder(tmp_path / "single"),
        model=TINY,
        task={"several": True},
        out=tmp_path / "one",
        **SMALL,
    )
    assert one.metrics["per_class"]["cat"]["images"] == 2
    assert "top1" not in one.metrics


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "faster_rcnn"}, "model: faster_rcnn finds objects; take model=yolo_n"),
        ({"augment": "standard"}, "augment: standard with task=classify; take augment=classify"),
        ({"augment": {"mixup": 0.6, "cutmix": 0.6}}, "augment.cutmix: 0.6 with augment.mixup=0.6"),
        ({"single_cls": True}, "data.single_cls: True; it changes nothing here"),
        ({"model": {"kind": "yolo_n", "backbone": "resnet18"}}, "model.backbone: resnet18; it"),
        ({"task": {"class_weights": [1.0]}}, "task.class_weights: 1 of them for 2 classes"),
    ],
)
def test_what_is_made_for_boxes_is_refused(tmp_path, keys, message):
    source = write_folder(tmp_path / "pets")
    with pytest.raises(ConfigError, match=message):
        vt.train(data=source, out=tmp_path / "run", **{**SMALL, **keys})


def test_a_classifier_is_no_detector(tmp_path):
    with pytest.raises(ConfigError, match="model: resnet_tiny classifies whole images; take"):
        vt.train(data="tiny", model="resnet_tiny", out=tmp_path / "run")


def scored_with(classifier, **keys):
    return replace(classifier, task=replace(classifier.task, config=ClassifyConfig(**keys)))


def test_a_picture_s_logits_are_the_mean_of_those_of_its_views(tmp_path):
    source = write_folder(tmp_path / "pets")
    task = {"flip": True, "shift": 3}
    run = vt.train(data=source, model=TINY, task=task, out=tmp_path / "run", **SMALL)
    classifier = vt.load(run.folder, device="cpu")
    assert classifier.task.views == Views(mirrored=True, shift=3)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    plain = scored_with(classifier)
    for flip, shift in product([False, True], [0, 1, 3]):
        wide = np.pad(pixels, ((shift, shift), (shift, shift), (0, 0)), mode="reflect")
        views = [pixels, pixels, wide[:32, :32], wide[2 * shift :, 2 * shift :]]
        views += [view[:, ::-1].copy() for view in (views if flip else [])]
        logits = torch.stack([one.scores.log() for one in plain.predict(views)])
        found = scored_with(classifier, flip=flip, shift=shift).predict(pixels)[0].scores
        torch.testing.assert_close(logits.mean(0).softmax(0), found)
    picture = save(PICTURES[0], tmp_path)
    assert classifier.predict(picture)[0].names == ("cat", "dog")
