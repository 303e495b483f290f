"""The program as it is typed: help, typos, exit codes, every verb and every preset."""

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import visiontrain
from visiontrain import cli, commands
from visiontrain.cli import VERBS, main
from visiontrain.core import errors
from visiontrain.core.shipped import presets, shipped
from visiontrain.engine.parity import Check, Report

TOP = Path(__file__).parents[2]
RAYS = ("compare", "parameter_server", "federated")  # what has tests of its own, being slow
PRESETS = [
    path.relative_to(shipped("cfg"))
    for name, path in presets(shipped("cfg")).items()
    if not set(name.split("/")) & set(RAYS)
]
SMALL = [
    *("data=tiny", "data.train_images=8", "data.val_images=2", "workers=0", "imgsz=64"),
    *("batch=4", "epochs=1", "device=cpu", "log.plots=false"),
]
LIGHT = """
import sys
from visiontrain.cli import main
code = main(sys.argv[1:])
print(*sorted({{{names}}} & set(sys.modules)), code, file=sys.stderr)
"""


def called(program, *words, **options):
    """Run a Python program in a process of its own."""
    return subprocess.run(
        [sys.executable, *program, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TOP), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def complaint(capsys):
    """Return the only line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("words", [[], ["--help"], ["train", "-h"], ["predict", "--help"]])
def test_help_takes_no_time_and_imports_nothing(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    heavy = "'torch', 'pydantic', 'numpy', 'yaml', 'cv2', 'rich'"
    done = called(["-c", LIGHT.format(names=heavy)], *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "0\n"
    assert "visiontrain" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_help_pages_and_reference_are_current():
    done = called([str(TOP / "tools" / "make_docs.py")], "--check")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_that_lists_its_keys(verb, capsys):
    assert main([verb, "--help"]) == 0
    page = capsys.readouterr().out
    assert page.startswith(f"visiontrain {verb}: ")
    assert max(map(len, page.splitlines())) <= 120


def test_typos_are_told_without_waiting_for_torch():
    done = called(["-c", LIGHT.format(names="'torch', 'cv2'")], "train", "epoch=5")
    assert done.stderr == "visiontrain: epoch: no such key; did you mean epochs?\n2\n"


def test_training_and_validation_wait_for_nothing_that_they_do_not_use(tmp_path):
    """Such as torch's compiler, which its optimizers import at their first step."""
    unused = "'torchvision', 'torch._dynamo', 'torch.distributed.tensor', 'timm', 'matplotlib'"
    program = LIGHT.format(names=unused)
    done = called(["-c", program], "train", *SMALL, f"out={tmp_path / 'run'}")
    assert done.stderr.splitlines()[-1] == "0"
    words = [*SMALL[:4], "device=cpu", "log.plots=false", f"out={tmp_path / 'val'}"]
    words.remove("data.train_images=8")
    program = LIGHT.format(names=unused + ", 'albumentations'")
    done = called(["-c", program], "val", f"weights={tmp_path / 'run'}", *words)
    assert done.stderr.splitlines()[-1] == "0"


def test_the_module_is_the_program():
    done = called(["-m", "visiontrain"], "--version")
    assert (done.stdout, done.returncode) == (f"{visiontrain.__version__}\n", 0)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["trian"], 2, "trian: no such verb; did you mean train?"),
        (
            ["export"],
            2,
            f"export: no such verb; take one of {', '.join(VERBS)}",
        ),
        (["train", "epochs=0"], 2, "epochs: 0; "),
        (["train", "split=test"], 2, "split: 'test'; it would change nothing here"),
        (["check", "batch=4"], 2, "batch: 4; it would change nothing here"),
        (["predict", "source=x"], 2, "weights: not given; add weights=VALUE"),
        (["val", "data=tiny"], 2, "weights: none given; "),
        (["val", "weights=absent"], 2, "weights: absent not found; "),
        (["train", "data=absent.yaml"], 3, "data: nothing at absent.yaml"),
        (["check", "data=absent.yaml"], 3, "data: nothing at absent.yaml"),
        (["data", "shard", "data=tiny"], 2, "out: not given; add out=VALUE"),
        (["data", "shard", "data=absent.yaml", "out=x"], 3, "data: nothing at absent.yaml"),
        (["parity", "data=absent.yaml", "strategy=ddp"], 3, "data: nothing at absent.yaml"),
    ],
)
def test_usage_errors_are_one_line_and_leave_nothing(
    words, code, line, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    assert complaint(capsys).startswith(f"visiontrain: {line}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.ConfigError, 2),
        (errors.CheckpointError, 2),
        (errors.DataError, 3),
        (errors.OutOfMemoryError, 4),
        (errors.DivergedError, 5),
        (errors.RankError, 1),
        (KeyboardInterrupt, 130),
    ],
)
def test_errors_end_with_their_exit_code(kind, code, monkeypatch, capsys):
    def fail(run):
        raise kind("here: this; do that")

    monkeypatch.setattr(commands, "train", fail)
    assert main(["train"]) == code
    assert complaint(capsys).startswith("visiontrain: ")


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    def fail(run):
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train"])


@pytest.mark.usefixtures("living")
@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_every_preset_trains(preset, tmp_path):
    small = SMALL if preset.parent.name != "classify" else ["data=digits", *SMALL[1:]]
    device = ["device=cpu,cpu"] if preset.stem == "placement" else []
    assert main(["train", str(preset), *small, *device, f"out={tmp_path}/run"]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_verbs_work_on_what_train_left(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMALL]) == 0
    run = Path("runs/detect/train")
    assert main(["train", str(run / "config.yaml"), "out=again"]) == 0
    weights = [folder / "weights" / "best.safetensors" for folder in (run, Path("again"))]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert main(["val", f"weights={run}", "split=test", "workers=0"]) == 0
    assert Path("runs/detect/val/metrics.json").is_file()
    cv2.imwrite("picture.png", np.zeros((48, 64, 3), np.uint8))
    assert main(["predict", f"weights={run}", "source=*.png", "device=cpu"]) == 0
    assert Path("runs/detect/predict/predictions.json").is_file()
    capsys.readouterr()
    assert main(["check", "data=tiny"]) == 0
    assert "train: 16 images" in capsys.readouterr().out
    assert main(["check", "data=digits", "task=classify"]) == 0
    assert "train: 1,258 images, 1,258 labels" in capsys.readouterr().out


def test_lines_that_nobody_reads_end_nothing():
    code = "from visiontrain.cli import _lasting\nfor k in range(3): _lasting('a line')\nprint(1)"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=-1, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_parity_prints_its_table_and_verdict(monkeypatch, capsys):
    check = Check("fp64", "weights", 1e-9, 1e-6)
    report = Report("ddp", 8, "approximate", ["norm"], [check])
    monkeypatch.setattr(commands, "parity", lambda run: report)
    assert main(["parity", "data=tiny", "strategy=ddp"]) == 1
    table, verdict = capsys.readouterr().out.splitlines()
    assert "weights after all steps" in table
    assert verdict == "ddp: approximate over 8 steps (norm)"
    exact = replace(report, verdict="exact", reasons=[])
    monkeypatch.setattr(commands, "parity", lambda run: exact)
    assert main(["parity", "data=tiny", "strategy=ddp"]) == 0
    assert capsys.readouterr().out.endswith("ddp: exact over 8 steps\n")


def test_every_verb_is_shown_and_runs():
    assert VERBS.keys() == cli.RUN.keys()
