import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import STEPS, config, prepared, scores, watched, weights_of
from torchvision.ops import batched_nms

import visiontrain as vt
from visiontrain import commands, worker
from visiontrain.core import durable
from visiontrain.core.config import from_keys, load
from visiontrain.core.errors import (
    ConfigError,
    DataError,
    OutOfMemoryError,
    StorageError,
)
from visiontrain.core.types import Place
from visiontrain.engine import trainer
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.weights import load_weights
from visiontrain.prepare import prepare
from visiontrain.recipe import Run

ROOT = Path(__file__).parents[2]
CPU = Place(torch.device("cpu"))
PROMISED = {
    *("task", "split", "images", "names", "map", "map50", "map75", "per_class", "epochs", "steps"),
    *("samples", "seconds", "train_images_per_s", "strategy", "processes", "bytes_sent"),
    *(
        "peak_rss_mb",
        "peaks_rss_mb",
        "seed",
        "versions",
        "threads",
        "initial_sha256",
        "config_sha256",
    ),
}
COLUMNS = ["epoch", "step", "samples", "seconds", "images_per_s", "data_wait", "lr"]


def test_a_run_leaves_what_is_promised(tmp_path):
    out = tmp_path / "run"
    assert commands.train(config(out, save_json=True, accumulate=2, **{"log.plots": True}))[1] == 0
    folder = RunFolder(out)
    metrics = json.loads(folder.metrics.read_text())
    assert metrics.keys() >= PROMISED
    assert (metrics["epochs"], metrics["steps"], metrics["samples"]) == (2, 2 * STEPS, 24)
    assert metrics["images"] == 4
    assert metrics["train_images_per_s"] > 0
    with folder.results.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[: len(COLUMNS)] == COLUMNS
    assert list(rows[0])[-1] == "bytes_sent"
    assert {"train/o2m/box", "val/map"} <= rows[0].keys()
    assert [row["step"] for row in rows] == ["3", "6"]
    best = max(rows, key=lambda row: float(row["val/map"]))
    assert metrics["map"] == pytest.approx(float(best["val/map"]), rel=1e-6)
    meta = load_weights(out).meta
    assert meta.metrics["map"] == metrics["map"]
    assert (meta.task, meta.imgsz, list(meta.names)) == ("detect", 64, metrics["names"])
    assert (out / "report.html").stat().st_size > 10_000
    assert (out / "plots" / "results.png").is_file()
    detections = json.loads((out / "detections.json").read_text())
    assert {"image_id", "file_name", "category_id", "bbox", "score"} == detections[0].keys()

    again = load(Run, [str(folder.config)], tmp_path)
    assert again.model_copy(update={"out": str(out)}) == prepare(
        config(tmp_path / "b", save_json=True, accumulate=2, **{"log.plots": True})
    ).model_copy(update={"out": str(out)})

    scored = tmp_path / "scored"
    keys = {"weights": out, "out": scored, "device": "cpu", "log": {"to": [], "plots": False}}
    run, code = commands.validate(from_keys(Run, keys))
    assert (run.batch, code) == (2, 0)  # as many at a time as training scored
    assert json.loads((scored / "metrics.json").read_text())["per_class"] == metrics["per_class"]
    assert (scored / "config.yaml").is_file()


def yolo_with_a_bad_row(root):
    """Make a YOLO data set of 4 pictures, one label row of which is no box."""
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), (i * 90, 40, 40)).save(root / f"images/{split}/{i}.png")
            rows = "0 0.5 0.5 0.4 0.4\n" + ("0 0.5\n" if (split, i) == ("train", 1) else "")
            (root / f"labels/{split}/{i}.txt").write_text(rows)
    yaml = "train: images/train\nval: images/val\nnames: [square]\ndownload: print(1)\n"
    (root / "data.yaml").write_text(yaml)
    return root / "data.yaml"


def test_what_is_left_out_is_said_before_training_and_scoring(tmp_path, capsys):
    source = str(yolo_with_a_bad_row(tmp_path / "set"))
    data = {"source": source, "workers": 0, "cache": "disk", "cache_dir": str(tmp_path / "cache")}
    keys = {"data": data, "log": {"to": ["console"], "plots": False}, "epochs": 1, "batch": 2}
    assert commands.train(config(tmp_path / "run", **keys))[1] == 0
    said = capsys.readouterr().out
    assert f"{source}: train: 1 malformed-row" in said
    assert "`download` is ignored" in said
    keys = {"data": {"source": source}, "split": "train", "weights": tmp_path / "run"}
    assert commands.validate(config(tmp_path / "scored", **keys, log={"to": ["console"]}))[1] == 0
    assert "train: 1 malformed-row" in capsys.readouterr().out


def test_a_cache_on_disk_is_written_once_for_all_processes(tmp_path, monkeypatch):
    source = str(yolo_with_a_bad_row(tmp_path / "set"))
    data = {"source": source, "workers": 0, "cache": "disk", "cache_dir": str(tmp_path / "cache")}
    seen = []
    monkeypatch.setattr(commands.launch, "run", lambda *_: seen.append(caches(tmp_path)) or 0)
    commands.train(config(tmp_path / "run", data=data, strategy="ddp"))
    assert len(seen[0]) == 2  # train and val
    for label in (tmp_path / "set" / "labels" / "val").iterdir():
        label.unlink()
    with pytest.raises(DataError, match="no box in 2 images"):
        commands.train(config(tmp_path / "other", data=data, strategy="ddp"))
    assert not (tmp_path / "other").exists()


def caches(folder):
    return list((folder / "cache").rglob("*.u8"))


def test_data_set_then_preset_then_user(tmp_path):
    run = prepare(load(Run, ["data=tiny", f"out={tmp_path}", "epochs=7"], tmp_path))
    assert (run.epochs, run.imgsz, run.augment.fliplr) == (7, 128, 0.0)
    assert run.precision == "fp32"


def test_a_taken_folder_is_refused_and_a_taken_name_numbered(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out: .* is not empty; add resume=true"):
        prepare(config(tmp_path))
    with pytest.raises(ConfigError, match=r"out: .*file is a file; name a folder"):
        prepare(config(tmp_path / "file"))
    project = tmp_path / "runs"
    folders = [prepare(config(None, project=str(project))).out for _ in range(3)]
    assert folders == [str(project / "detect" / name) for name in ("train", "train-2", "train-3")]


def test_patience_ends_a_run_and_the_best_epoch_is_kept(tmp_path):
    _, fitter = prepared(tmp_path, epochs=9, patience=2)
    values = [0.1, 0.3, 0.2, float("nan"), 0.9]  # the last is of the best weights, at the end
    watch = watched(fitter)
    outcome = scores(fitter, values).fit()
    told = "complete after epoch 4: no better score for 2 epochs; patience=0 goes on"
    assert told in watch.lines
    assert outcome.exit_code == 0
    assert (outcome.metrics["epochs"], outcome.metrics["best_epoch"]) == (4, 2)
    assert load_weights(tmp_path).meta.epoch == 2
    assert load_weights(RunFolder(tmp_path).last).meta.epoch == 4


def test_while_nothing_is_found_what_was_trained_longer_is_better(tmp_path):
    _, fitter = prepared(tmp_path, epochs=4, patience=1)
    outcome = scores(fitter, [float("nan"), 0.0, 0.0, 0.0, 0.9]).fit()
    assert (outcome.metrics["epochs"], outcome.metrics["best_epoch"]) == (4, 4)
    assert load_weights(tmp_path).meta.epoch == 4


def test_without_val_only_the_last_epoch_is_scored(tmp_path):
    _, fitter = prepared(tmp_path, epochs=3, val=False)
    watch = watched(scores(fitter, [0.5, 0.5]))
    fitter.fit()
    assert ["val/map" in row for row in watch.rows] == [False, False, True]


def test_time_ends_a_run_early_but_complete(tmp_path):
    _, fitter = prepared(tmp_path, epochs=50, time=1e-9)
    outcome = scores(fitter, [0.5, 0.5]).fit()
    assert (outcome.exit_code, outcome.metrics["steps"]) == (0, 1)
    assert load_weights(tmp_path).meta.step == 1


def test_progress_is_told_true_numbers(tmp_path):
    _, fitter = prepared(tmp_path)
    watch = watched(scores(fitter, [0.1] * 3))
    fitter.fit()
    assert [(epoch, done) for epoch, done, *_ in watch.steps] == [(1, 3), (2, 3)]
    numbers = watch.steps[0][3]
    assert numbers["lr"] == fitter.learner.schedule.lr(8)
    assert 0 < numbers["data_wait"] < 1
    seconds = watch.rows[-1]["seconds"]
    assert watch.rows[0]["images_per_s"] > 12 / seconds  # evaluating and saving don't count


# -- running out ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
)
def test_out_of_memory_says_what_would_do(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(trainer, "train_step", fail)
    run = prepare(config(tmp_path))
    with pytest.raises(OutOfMemoryError, match=r"batch: 4 images of 64 .* accumulate=2") as caught:
        worker.main(run.model_dump_json(), CPU)
    assert caught.value.exit_code == 4
    with pytest.raises(OutOfMemoryError, match=r"do not fit in memory; set a smaller imgsz or"):
        worker.main(run.model_copy(update={"accumulate": 3}).model_dump_json(), CPU)


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        worker.main(prepare(config(tmp_path)).model_dump_json(), CPU)


def test_a_disk_that_fills_up_costs_nothing_that_was_saved(tmp_path, monkeypatch):
    run, fitter = prepared(tmp_path / "a")
    real, on_disk = os.fsync, []

    def fsync(handle):
        if watch.rows:
            on_disk.append(handle)
        if len(on_disk) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    watch = watched(fitter)
    monkeypatch.setattr(durable.os, "fsync", fsync)
    with pytest.raises(StorageError, match=r"no space left on the disk.*resume=true"):
        fitter.fit()
    monkeypatch.undo()
    worker.main(run.model_copy(update={"resume": True}).model_dump_json(), CPU)
    _, whole = prepared(tmp_path / "b")
    whole.fit()
    ours, theirs = load_weights(tmp_path / "a").tensors, load_weights(tmp_path / "b").tensors
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- starting from weights ------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"kind": "yolo_n", "head": "nms"},
        {"kind": "yolo_n", "finest": 4},
        {"kind": "yolo_n", "backbone": "tf_efficientnet_lite0", "norm": "frozen"},
        {"kind": "yolo_n", "backbone": "regnetx_002", "pretrained": "none"},
        {"kind": "fcos"},
        {"kind": "faster_rcnn", "trainable_layers": 2},
    ],
)
def test_every_kind_of_detector_trains_scores_and_is_loaded(tmp_path, model):
    few = {"data.train_images": 4, "data.val_images": 2}  # one step
    run, fitter = prepared(tmp_path / "run", epochs=1, model=model, **few)
    suppressed = model["kind"] != "yolo_n" or model.get("head") == "nms"
    assert run.task.nms == suppressed
    before = weights_of(fitter)
    assert fitter.fit().exit_code == 0
    after = weights_of(fitter)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    scored = config(tmp_path / "scored", weights=tmp_path / "run", **{"task.conf": 0.0})
    assert commands.validate(scored)[1] == 0
    detector = vt.load(tmp_path / "run", conf=0.0, device="cpu")
    (found,) = detector.predict([np.zeros((64, 64, 3), np.uint8)])
    assert len(found.scores)
    kept = batched_nms(found.boxes, found.scores, found.classes, 0.7)
    assert len(kept) == len(found.scores) or not suppressed


def test_weights_start_a_run_and_frozen_blocks_stay(tmp_path, capsys):
    commands.train(config(tmp_path / "a", epochs=1))
    _, fitter = prepared(
        tmp_path / "b", weights=tmp_path / "a", freeze=2, log={"to": ["console"], "plots": False}
    )
    assert "weights: took" in capsys.readouterr().out
    start = weights_of(fitter)
    given = load_weights(tmp_path / "a").tensors
    assert all(torch.equal(start[name], given[name]) for name in given)
    watched(scores(fitter, [0.1] * 3))
    fitter.fit()
    names = tuple(f"blocks.{name}." for name in list(fitter.learner.model.blocks)[:2])
    after = fitter.learner.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert not [name for name in moved if name.startswith(names)]
    assert any(name.startswith("blocks.stage4.") for name in moved)


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="freeze: 10"):
        commands.train(config(tmp_path / "run", freeze=10))
    assert not (tmp_path / "run").exists()


def test_freezing_everything_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="freeze: 10; the model has 10 blocks"):
        prepared(tmp_path, freeze=10)


@pytest.mark.parametrize("mode", ["single", "ddp"])
def test_a_run_goes_on_when_nobody_reads_it_any_more(tmp_path, mode):
    words = ["data=tiny", "data.train_images=8", "data.val_images=4", "imgsz=64", "batch=4"]
    words += ["epochs=2", "device=cpu", "workers=0", "plots=false", "augment=none"]
    words += [f"strategy={mode}"]
    command = [sys.executable, "-m", "visiontrain", "train", *words, f"out={tmp_path / 'run'}"]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **both) as started:
        assert "images to train on" in started.stdout.readline()
        started.stdout.close()  # as `| head -1` does
        said = started.stderr.read()
        assert started.wait() == 0, said
    assert said == ""
    assert (tmp_path / "run/metrics.json").is_file()
