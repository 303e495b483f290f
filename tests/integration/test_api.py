"""The Python API, as docs/api.md shows it, and from a program without a main guard."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import visiontrain
from visiontrain.api import CompareKeys, LoadKeys, PlanKeys, PredictKeys, TrainKeys
from visiontrain.compare_config import CompareConfig
from visiontrain.core.keys import ALIASES
from visiontrain.plan_config import PlanConfig
from visiontrain.predict_config import DetectorConfig, PredictConfig
from visiontrain.recipe import Run

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
PROGRAM = """
import visiontrain as vt
run = vt.train(data="tiny", epochs=1, batch=4, imgsz=64, device="cpu", out="run", workers=0,
               strategy={"kind": "ddp", "processes": 2}, log={"to": [], "plots": False})
print(run.exit_code, run.metrics["strategy"], run.metrics["processes"], run.weights.is_file())
"""


def test_typed_keys_are_those_of_the_config():
    objects = {"loss", "logger"}  # sections or keys that only objects fill
    assert TrainKeys.__annotations__.keys() == Run.model_fields.keys() | ALIASES.keys() | objects
    compared = CompareConfig.model_fields.keys() | ALIASES.keys()
    assert CompareKeys.__annotations__.keys() == compared | objects
    planned = PlanConfig.model_fields.keys() | ALIASES.keys()
    assert PlanKeys.__annotations__.keys() == planned | objects
    assert PredictKeys.__annotations__.keys() == PredictConfig.model_fields.keys() | {"model"}
    assert LoadKeys.__annotations__.keys() == DetectorConfig.model_fields.keys() - {"weights"} | {
        "model"
    }


@pytest.mark.usefixtures("living")
def test_docs_run_as_they_stand(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(DOCS), "exec"), names)
    shown = capsys.readouterr().out
    assert "epoch: no such key; did you mean epochs?" in shown
    assert "1 image, " in shown
    assert names["run"].weights == Path("runs/first/weights/best.safetensors")
    assert names["again"].config.task.topk == 8


def test_two_processes_from_a_program_without_a_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-"],
        input=PROGRAM,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0", "ddp", "2", "True"], done.stderr


def test_what_fails_is_an_error_not_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(visiontrain.DataError):
        visiontrain.train(data="absent.yaml")
    with pytest.raises(visiontrain.CheckpointError):
        visiontrain.val(weights="absent.safetensors")
    assert not list(tmp_path.iterdir())
