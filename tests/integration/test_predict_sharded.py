"""predict on several processes, or through several stages, leaves what one leaves, to the byte."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from visiontrain import worker
from visiontrain.cli import main
from visiontrain.commands import predict
from visiontrain.core.errors import DataError
from visiontrain.core.types import Detections, Place
from visiontrain.data.inputs import find_inputs
from visiontrain.data.shots import portions
from visiontrain.engine.detector import Detector
from visiontrain.engine.weights import WeightsMeta, save_weights
from visiontrain.models.config import ResNetTiny, YoloN
from visiontrain.models.registry import build_model
from visiontrain.predict_config import PredictConfig
from visiontrain.prediction import from_text, mode_of, prepare_prediction, to_text
from visiontrain.report.detections import Film
from visiontrain.strategies.member import share_of

NAMES = ["cell", "platelet"]
SIZES = ((90, 50), (64, 64), (40, 120), (200, 30), (33, 77))  # width, height
TIMES = {"seconds", "images_per_s", "strategy", "processes"}  # in metrics.json
PROGRAM = """
import sys
import visiontrain as vt
result = vt.predict(weights=sys.argv[1], source=sys.argv[2], conf=0.0, max_det=3, batch=2,
                    save_txt=True, save_json=True, device="cpu", out="many",
                    strategy={"kind": "ddp", "threads": 1})
print(len(result.rows), result.objects, len(result.unreadable), result.exit_code)
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(YoloN(), len(NAMES))
    path = tmp_path_factory.mktemp("weights") / "some.safetensors"
    save_weights(
        path, WeightsMeta("detect", YoloN().model_dump(), NAMES, 64), dict(model.state_dict())
    )
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of many sizes, two of one stem, one that is broken, two videos, one of them long."""
    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)

    def picture(name, width, height):
        pixels = random.integers(0, 255, (height, width, 3), np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / name)

    for name in ("a.jpg", "c/a.png", "c/b.bmp", "z.jpg", "a.png"):
        picture(name, *SIZES[len(name) % 5])
    for k, (width, height) in enumerate(SIZES):
        picture(f"{k}.jpg", width, height)
    (folder / "2.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "y.png").write_bytes(b"")
    nothing = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))
    for name, frames in (("b.mp4", 5), ("c/b.mp4", 1)):
        film = Film(folder / name, 5.0)
        for number in range(frames):
            film.add(random.integers(0, 255, (48, 64, 3), np.uint8), nothing, NAMES, number)
        film.close()
    return folder


def config(weights, folder, out, **keys):
    return for_classes(
        weights, folder, out, **{"conf": 0.0, "max_det": 3, "save_json": True} | keys
    )


def for_classes(weights, folder, out, **keys):
    return PredictConfig(
        **{"weights": str(weights), "source": str(folder), "out": str(out), "device": "cpu"},
        **{"batch": 2, "save_txt": True} | keys,
    )


def share(text, signalled=0):
    """Be one process of a prediction; the last rank gets a signal during its first batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = share_of(mode_of(from_text(text)), rank, world)
    if signalled and rank == world - 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Detector, "detect", signalling(signalled))
            return share(text)
    place = Place(torch.device("cpu"), rank, world, shard, is_main=rank == 0)
    return worker.predict(text, place)


def signalling(number, detect=Detector.detect):
    """Return a `detect` during which the process gets the signal `number`."""

    def interrupted(self, images, most):
        os.kill(os.getpid(), number)
        return detect(self, images, most)

    return interrupted


def left(folder):
    """Return all files of a run's folder, and what is the same in metrics.json for any mode."""
    metrics = json.loads((folder / "metrics.json").read_text())
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "metrics.json"
    }
    return files, {key: value for key, value in metrics.items() if key not in TIMES}


def test_any_number_of_processes_leaves_the_same_bytes(weights, folder, tmp_path, ranks):
    said = []
    one = predict(config(weights, folder, tmp_path / "one"), said.append)
    files, metrics = left(one.folder)
    assert len(one.rows) == 9 + 6
    assert [reason.rsplit("/", 1)[1].split(":")[0] for reason in one.unreadable] == [
        "2.jpg",
        "y.png",
    ]
    assert len(said) == 3
    assert {len(row["boxes"]) for row in one.rows} == {3}
    assert len(files) == 2 + 2 * 9 + 2 + 6  # JSON, pictures and their labels, films, of frames
    assert len(portions(find_inputs(str(folder)), 2)) == 6 + 2
    for world in (2, 3):
        mode = {"kind": "ddp", "processes": world}
        many = prepare_prediction(config(weights, folder, tmp_path / str(world), strategy=mode))
        assert ranks(world).run(share, to_text(many)) == [0] * world
        assert left(tmp_path / str(world)) == (files, metrics)


def test_more_processes_than_pictures(weights, folder, tmp_path, ranks):
    one = predict(config(weights, folder / "a.png", tmp_path / "one"), lambda _: None)
    mode = {"kind": "ddp", "processes": 3}
    many = prepare_prediction(config(weights, folder / "a.png", tmp_path / "3", strategy=mode))
    assert ranks(3).run(share, to_text(many)) == [0] * 3
    assert left(tmp_path / "3") == left(one.folder)


@pytest.mark.parametrize(
    ("world", "mode", "keys"),
    [
        (3, {"stages": ["stage4", "head"]}, {}),
        (4, {"data_parallel": 2}, {}),
        (2, {}, {"tile": 32, "overlap": 0.25}),
    ],
)
def test_a_pipeline_leaves_what_one_device_leaves(
    world, mode, keys, weights, folder, tmp_path, ranks
):
    one = predict(config(weights, folder, tmp_path / "one", **keys), lambda _: None)
    mode = {"kind": "pipeline", "processes": world, **mode}
    many = prepare_prediction(config(weights, folder, tmp_path / "many", strategy=mode, **keys))
    assert ranks(world).run(share, to_text(many)) == [0] * world
    assert left(tmp_path / "many") == left(one.folder)


def test_a_classifier_in_a_pipeline_scores_as_on_one_device(folder, tmp_path, ranks):
    torch.manual_seed(0)
    model = build_model(ResNetTiny(), len(NAMES), "classify")
    task = {"kind": "classify", "flip": True}
    meta = WeightsMeta("classify", ResNetTiny().model_dump(), NAMES, 32, task)
    path = tmp_path / "some.safetensors"
    save_weights(path, meta, dict(model.state_dict()))
    one = predict(for_classes(path, folder / "c", tmp_path / "one"), lambda _: None)
    mode = {"kind": "pipeline", "processes": 2}
    many = prepare_prediction(for_classes(path, folder / "c", tmp_path / "many", strategy=mode))
    assert ranks(2).run(share, to_text(many)) == [0, 0]
    assert left(tmp_path / "many") == left(one.folder)
    assert len(one.rows) == 3


def differ(text, other):
    """Be one process of a prediction; the last one sees other files."""
    last = dist.get_rank() == dist.get_world_size() - 1
    try:
        with pytest.MonkeyPatch.context() as patch:
            if last:
                patch.setattr("visiontrain.data.shots.read_bytes", lambda _: other)
            share(text)
    except DataError as error:
        return str(error)


def test_processes_of_a_pipeline_that_see_other_files_are_stopped(weights, folder, tmp_path, ranks):
    mode = {"kind": "pipeline", "processes": 2}
    many = prepare_prediction(config(weights, folder, tmp_path / "out", strategy=mode))
    said = ranks(2).run(differ, to_text(many), (folder / "a.png").read_bytes())
    assert said[0] == said[1]
    assert said[0].startswith("source: the processes of a pipeline read other pictures")


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        (["strategy=fsdp"], "strategy: 'fsdp'; take one of single, ddp, pipeline"),
        (["strategy=placement"], "strategy: 'placement'; take one of single, ddp, pipeline"),
        (["strategy=pipeline", "strategy.schedule=zbv"], "strategy.schedule: no such key"),
        (["strategy=pipeline", "strategy.processes=40"], "strategy.processes: 40 for a pipeline"),
        (["strategy=pipeline", "strategy.stages=[up9]"], "strategy.stages: no block 'up9'; blo"),
        (["strategy=pipeline", "strategy.data_parallel=2"], "strategy.data_parallel: 2 with 2 pr"),
    ],
)
def test_modes_that_cannot_predict_are_refused_in_a_line(
    mode, line, weights, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", f"weights={weights}", f"source={folder}", "device=cpu", *mode]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"visiontrain: {line}")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["ddp", "pipeline"])
def test_a_signal_to_one_process_stops_all_and_leaves_what_was_found(
    kind, weights, folder, tmp_path, ranks
):
    mode = {"kind": kind, "processes": 2}
    many = prepare_prediction(config(weights, folder, tmp_path / "out", strategy=mode))
    code = 128 + signal.SIGTERM
    assert ranks(2).run(share, to_text(many), signal.SIGTERM) == [code, code]
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    found = ["0.jpg", "1.jpg", "3.jpg"]  # 2 is broken
    assert [row["file_name"] for row in rows] == found[: 2 if kind == "pipeline" else 3]


def test_one_process_stops_after_a_batch(weights, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Detector, "detect", signalling(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        predict(config(weights, folder, tmp_path / "out"), lambda _: None)
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [row["file_name"] for row in rows] == ["0.jpg", "1.jpg"]


def started(*words, **options):
    """Run a Python program in a process of its own; return what it printed."""
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_without_a_main_guard_and_torchrun(weights, folder, tmp_path):
    one = predict(config(weights, folder, tmp_path / "one"), lambda _: None)
    said = started("-", str(weights), str(folder), input=PROGRAM, cwd=tmp_path)
    assert said.split() == ["15", str(15 * 3), "2", "0"]
    assert left(tmp_path / "many") == left(one.folder)
    keys = ["conf=0", "max_det=3", "batch=2", "save_txt=true", "save_json=true", "out=joined"]
    said = started(
        *("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"),
        *("-m", "visiontrain", "predict", f"weights={weights}", f"source={folder}", *keys),
        *("device=cpu", "strategy=ddp", "strategy.threads=1"),
        cwd=tmp_path,
    )
    assert left(tmp_path / "joined") == left(one.folder)
    assert [line.split(":")[0] for line in said.splitlines()[:2]] == ["left out", "left out"]
    assert said.splitlines()[2].startswith("15 images, 2 unreadable left out, 45 objects, ")
    assert len(said.splitlines()) == 3
    staged = ["strategy=pipeline", "strategy.processes=2", "strategy.threads=1", "out=staged"]
    words = ["predict", f"weights={weights}", f"source={folder}", *keys[:-1], *staged, "device=cpu"]
    started("-m", "visiontrain", *words, cwd=tmp_path)
    assert left(tmp_path / "staged") == left(one.folder)
