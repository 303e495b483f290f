"""`visiontrain plan` as typed: what modes need, foretold and weighed."""

import json

import pytest

from visiontrain.cli import main
from visiontrain.core.config import from_keys
from visiontrain.prepare import config_text
from visiontrain.recipe import Run

WORDS = ["data=tiny", "imgsz=64", "batch=8", "devices=2"]


def table(capsys, *words):
    code = main(["plan", *WORDS, *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.usefixtures("living")
@pytest.mark.parametrize(
    "words",
    [["accumulate=2"], ["strategy=pipeline", "strategy.schedule=1f1b", "accumulate=4"]],
    ids=" ".join,
)
def test_what_is_foretold_is_what_is_weighed(words, capsys):
    """Of several images at a time, and of one."""
    code, out, _ = table(capsys, "imgsz=192", "measure=true", "--json", *words)
    assert code == 0
    told = json.loads(out)
    assert told["left_out"] == []
    schedule = "1f1b" if len(words) > 1 else "gpipe"
    modes = ["single", "ddp", "fsdp", f"pipeline, {schedule}"]
    assert [mode["mode"] for mode in told["modes"]] == modes
    for mode in told["modes"]:
        held = [process["tensors"] for process in mode["weighed"]]
        assert len(held) == (1 if mode["mode"] == "single" else 2)
        needs = mode["needs"] * (len(held) // len(mode["needs"]))
        known = [need["tensors"] for need in needs]
        # Of one image at a time, what FSDP has at work weighs as much as activations.
        close = 0.15 if mode["mode"] == "fsdp" else 0.1
        assert known == pytest.approx(held, rel=close), mode["mode"]
        assert mode["sent"] == max(process["sent"] for process in mode["weighed"]), mode["mode"]


def test_the_table_says_which_mode_fits(capsys):
    code, out, _ = table(capsys, "memory=0.001", "strategy=pipeline", "strategy.schedule=1f1b")
    assert code == 0
    assert "2 devices, 0.001 GiB each; " in out
    rows = [line for line in out.splitlines() if line.endswith("  no")]
    assert [row.split()[0] for row in rows] == ["single", "ddp", "fsdp", "pipeline,", "#1"]
    assert "pipeline, 1f1b: stages begin at " in out


def test_a_pipeline_of_more_stages_than_blocks_is_left_out(capsys):
    code, out, _ = table(capsys, "devices=64", "model.backbone=null")
    assert code == 0
    assert "pipeline: 64 stages; the model has " in out


def test_sides_that_vary_are_planned_at_the_largest(capsys):
    def activations(*words):
        code, out, _ = table(capsys, "imgsz=192", "--json", *words)
        assert code == 0
        told = json.loads(out)
        needs = [mode["needs"][0]["activations"] for mode in told["modes"][:2]]
        return needs, told["title"].split(",")[1].strip()

    varied, title = activations("augment.multi_scale=0.4")
    assert title == "256 px (the largest)"
    assert varied == activations("imgsz=256")[0]


def test_the_config_of_a_run_can_be_planned(capsys, tmp_path):
    run = from_keys(Run, {"data": "tiny", "imgsz": 64, "batch": 8, "strategy": "ddp"})
    (tmp_path / "config.yaml").write_text(config_text(run))  # with all keys of its mode
    assert main(["plan", str(tmp_path / "config.yaml"), "devices=2"]) == 0
    assert "ddp" in capsys.readouterr().out


def test_modes_that_cannot_train_are_left_out(capsys):
    code, out, _ = table(capsys, "optim=muon")
    assert code == 0
    assert "fsdp: optim: muon under strategy=fsdp" in out
    assert "yes" in out


def test_sharded_bytes_are_the_same_in_both_tables(capsys):
    """In lower precision, in parts, and of a model that trains in part."""
    words = ["precision=bf16", "accumulate=2", "freeze=1", "links=10mbit", "counts=[2]", "--json"]
    code, out, _ = table(capsys, *words)
    assert code == 0
    told = json.loads(out)
    (known,) = [mode for mode in told["modes"] if mode["mode"] == "fsdp"]
    (found,) = [speed for speed in told["predicted"]["speeds"] if speed["mode"] == "fsdp"]
    assert found["sent"] == pytest.approx(known["sent"], abs=1)  # of half a byte


def test_speeds_are_predicted_on_links_that_are_given(capsys):
    words = ["links=10mbit,100gbit", "counts=[2,4]", "step_s=0.5", "--json"]
    code, out, _ = table(capsys, *words)
    assert code == 0
    told = json.loads(out)["predicted"]
    assert (told["prediction"], told["step_source"]) == (True, "as it was given")
    assert (told["images"], told["step_s"]) == (4, pytest.approx(0.5))
    found = {(s["link"], s["mode"], s["devices"]): s for s in told["speeds"]}
    assert len(found) == 2 * 7 * 2
    ddp = found["10mbit", "ddp", 2]
    (known,) = [mode for mode in json.loads(out)["modes"] if mode["mode"] == "ddp"]
    assert ddp["sent"] == known["sent"]
    assert ddp["seconds"] > ddp["sent"] / 1.25e6
    # What sends less is faster where the link is slow; where it is fast, computing decides.
    slow = [found["10mbit", mode, 2]["seconds"] for mode in ("fsdp", "ddp", "ddp, sync_every=20")]
    assert slow == sorted(slow, reverse=True)
    fast = found["100gbit", "ddp", 4]
    assert fast["seconds"] == pytest.approx(0.5, rel=0.05)
    assert fast["images_per_s"] == pytest.approx(16 / fast["seconds"])
    pipe = found["100gbit", "pipeline of 2, gpipe", 2]
    (known,) = [mode for mode in json.loads(out)["modes"] if "gpipe" in mode["mode"]]
    assert pipe["sent"] == known["sent"]
    # Beside passes, which bubbles stretch, a step has what is done once: loss, optimizer.
    assert 1 - known["bubble"] - 0.03 < pipe["efficiency"] < 1


def test_the_table_of_speeds_says_that_it_is_a_prediction(capsys):
    code, out, _ = table(capsys, "links=10gbit", "counts=[2,8]", "per_node=8", "step_s=0.1")
    assert code == 0
    lines = out.splitlines()
    begins = next(n for n, line in enumerate(lines) if line.startswith("predicted, not measured: "))
    assert (
        "4 images each, from 0.1 s a step of one (as it was given), 8 devices on NV"
        in lines[begins]
    )
    assert lines[begins + 1].split() == ["10gbit", "W=2", "W=8"]
    assert lines[begins + 2].split()[0] == "ddp"


def test_a_launcher_has_nothing_to_start_here(capsys, monkeypatch):
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    code, _, err = table(capsys)
    assert code == 2
    assert err.startswith("visiontrain: plan: under a launcher; ")


def test_stages_that_cannot_be_leave_the_pipeline_out(capsys):
    code, out, err = table(capsys, "strategy=pipeline", "strategy.stages=[nowhere]")
    assert (code, err) == (0, "")
    assert "pipeline: strategy.stages: no block 'nowhere'" in out


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("batch=-1", "batch: -1; what fits differs from mode to mode"),
        ("device=7", "device: '7'"),
        ("model=faster_rcnn", "model: faster_rcnn is one block"),
        ("devices=0", "devices: 0"),
        ("devices=1 strategy=fsdp", "strategy: fsdp on one device, where nobody shares; take dev"),
        ("strategy=placement", "strategy: placement; plan counts with one device per process"),
        ("strategy.kind=ddp strategy.compress=fp16", "strategy.compress: plan does not know"),
        ("epoch=3", "epoch: no such key"),
        ("links=10", "links: '10'; take a rate as 10gbit"),
        ("links=10gbit counts=[1]", "counts: 1; take 2 devices or more"),
        ("devices=3 strategy=ddp strategy.processes=2", "devices: 3, but strategy.processes is 2;"),
        ("strategy=client", "strategy: client; plan counts with one device per process"),
        ("step_s=0.1", "step_s: it changes nothing without links"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(capsys, word, message):
    code, _, err = table(capsys, *word.split())
    assert code == 2
    assert err.startswith(f"visiontrain: {message}")
    assert err.count("\n") == 1
