"""Several modes side by side: the same start and samples, a row for each, whatever happens."""

import csv
import importlib.util
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from small import KEYS, config, digests

from visiontrain import app, cli, commands, comparison, series, start
from visiontrain.compare_config import USES, CompareConfig, modes
from visiontrain.core.config import from_keys, load
from visiontrain.core.errors import ConfigError, RankError
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Place
from visiontrain.engine.parity import Report
from visiontrain.engine.signals import Signals
from visiontrain.engine.weights import digest
from visiontrain.report import compare as table
from visiontrain.report.related import related
from visiontrain.report.rows import Row, Trial
from visiontrain.strategies import launch
from visiontrain.tasks.detect import DetectTask

SMALL = [
    *("data=tiny", "data.train_images=12", "data.val_images=4", "workers=0", "imgsz=64"),
    *("batch=4", "epochs=1", "device=cpu", "log.plots=false", "log.to=[]", "model.norm=group"),
]
BROKEN = "rank 1 of 2: KeyError: 'x'; its traceback ends with\nKeyError: 'x'"


def asked(out, *strategies, **keys):
    given = {**KEYS, "epochs": 1, "out": out, **keys}
    given |= {"strategies": list(strategies)} if strategies else {}
    return from_keys(CompareConfig, given, None, USES, comparison.below)


def compare(out, *strategies, **keys):
    return comparison.compare(asked(out, *strategies, **keys), lambda _: None)


def fails(*_, **__):
    raise AssertionError("this was done before")


@pytest.fixture(scope="module")
def compared(on_ranks, tmp_path_factory):
    """Return the folder of a comparison as it is typed, of one device and two processes."""
    out = tmp_path_factory.mktemp("compare") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", on_ranks)
        assert cli.main(["compare", *SMALL, "strategies=single,ddp", f"out={out}"]) == 0
    return out


@pytest.fixture
def copied(compared, tmp_path):
    """Return a copy of it, for tests that change what lies there."""
    return shutil.copytree(compared, tmp_path / "run")


def test_a_row_per_mode_says_what_its_run_did(compared):
    written = json.loads((compared / "compare.json").read_text())
    assert written["complete"]
    one, two = written["rows"]
    runs = [json.loads((compared / n / "metrics.json").read_text()) for n in ("single", "ddp")]
    for row, run in zip((one, two), runs, strict=True):
        assert [row["map"], row["seconds"]] == [run["map"], run["seconds"]]
        assert row["images_per_s"] == run["train_images_per_s"]
        assert (row["samples"], row["steps"], row["error"]) == (12, 3, None)
        assert row["initial_sha256"] == written["initial_sha256"]
        assert row["peak_rss_mb"] > 100
    assert (one["processes"], two["processes"]) == (1, 2)
    assert (one["exactness"], two["exactness"]) == ("control", "exact")
    assert two["difference"] == pytest.approx(two["map"] - one["map"])
    assert two["speedup"] == pytest.approx(two["images_per_s"] / one["images_per_s"])
    assert two["efficiency"] == pytest.approx(
        two["speedup"] * one["threads"] / (2 * two["threads"])
    )
    model = start.build_fresh(config(compared), [str(n) for n in range(10)], None)
    size = sum(4 * p.numel() for p in model.parameters())
    assert two["bytes_per_step"] == pytest.approx(size, rel=1e-3)  # ring: 2 (W - 1) / W
    with (compared / "compare.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["single", "ddp"]


def test_what_is_complete_is_not_repeated(compared, monkeypatch, capsys):
    monkeypatch.setattr(commands, "train", fails)
    monkeypatch.setattr(commands, "parity", fails)
    before = json.loads((compared / "compare.json").read_text())
    assert cli.main(["compare", f"out={compared}", "resume=true"]) == 0
    assert json.loads((compared / "compare.json").read_text()) == before
    assert "complete already" in capsys.readouterr().out


def test_a_changed_config_is_not_taken_for_complete(copied, monkeypatch):
    asked_for = []
    monkeypatch.setattr(commands, "train", lambda run: asked_for.append(run) or (run, 75))
    words = ["compare", f"out={copied}", "resume=true", "patience=7", "strategies=single,ddp"]
    assert cli.main(words) == 75
    assert [(run.patience, run.resume) for run in asked_for] == [(7, True)]


def test_a_run_that_began_with_other_weights_is_an_error(copied, monkeypatch, capsys):
    monkeypatch.setattr(comparison, "initial_sha256", lambda run: "f" * 64)
    assert cli.main(["compare", f"out={copied}", "resume=true"]) == 1
    shown = capsys.readouterr().out
    assert "ddp: weights: ddp began with " in shown
    assert "not with ffffffffffffffff as the others" in " ".join(shown.split())


def begun(out, kind):
    """Return the digest of what one rank of a mode begins with, placed and collected again."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shard = (0, 1) if kind == "pipeline" else (rank, world)
    place = Place(torch.device("cpu"), rank, world, shard, is_main=rank == 0)
    trainer = app.build(config(out, strategy=kind), place)
    return digest(trainer.learner.collect()["model"])


def test_every_mode_begins_with_the_same_weights(ranks, tmp_path):
    want = start.initial_sha256(config(tmp_path))
    assert want != start.initial_sha256(config(tmp_path, seed=1))
    for kind in ("ddp", "fsdp", "pipeline"):
        assert ranks(2).run(begun, tmp_path, kind)[0] == want


def without(monkeypatch, kind, result):
    """Let runs of a mode end otherwise than by training."""
    train = commands.train
    monkeypatch.setattr(
        commands, "train", lambda run: result() if run.strategy.kind == kind else train(run)
    )


def broken():
    raise RankError(BROKEN)


def test_a_mode_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    without(monkeypatch, "fsdp", broken)
    report = Report("ddp", 3, "approximate", ["of this"], [])
    monkeypatch.setattr(commands, "parity", lambda *_: report)
    found = compare(tmp_path / "run", "fsdp", "single")
    assert found.exit_code == 1
    assert [row.name for row in found.rows] == ["fsdp", "single"]
    assert found.rows[0].error == BROKEN
    assert found.rows[0].images_per_s is None
    assert found.rows[0].difference is None  # of a row that has no score
    assert found.rows[1].difference == 0  # the control, though it is not the first
    assert found.rows[1].efficiency == 1.0
    assert "fsdp: rank 1 of 2: KeyError: 'x'; its traceback ends with\n" in str(found)
    monkeypatch.setattr(commands, "train", lambda run: (_ for _ in ()).throw(KeyError("a bug")))
    again = compare(tmp_path / "run", resume=True)
    assert [row.error for row in again.rows] == ["KeyError: 'a bug'", None]


def kill_in(monkeypatch, owner, name, call):
    """Let SIGTERM come in the `call`-th call of a function."""
    calls, function = [], getattr(owner, name)

    def killing(*args, **keys):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **keys)

    monkeypatch.setattr(owner, name, killing)


def test_a_stopped_comparison_goes_on_inside_its_run(tmp_path, monkeypatch):
    whole = compare(tmp_path / "whole", "single", check=False)
    without(monkeypatch, "ddp", broken)
    with monkeypatch.context() as patch:
        kill_in(patch, DetectTask, "loss", 2)
        found = compare(tmp_path / "cut", "single", "ddp", check=False)
    assert (found.exit_code, found.rows) == (75, [])
    assert f"visiontrain compare out={tmp_path / 'cut'} resume=true" in str(found)
    assert not (tmp_path / "cut" / "ddp").exists()
    found = compare(tmp_path / "cut", resume=True)
    assert [row.name for row in found.rows] == ["single", "ddp"]
    assert found.rows[0].scores == whole.rows[0].scores
    assert found.rows[0].initial_sha256 == whole.initial_sha256
    assert digests(tmp_path / "cut" / "single") == digests(tmp_path / "whole" / "single")


@pytest.mark.parametrize("where", ["before", "results", "check"])
def test_a_signal_stops_also_where_no_run_can(tmp_path, monkeypatch, where):
    without(monkeypatch, "ddp", fails)
    if where == "before":
        kill_in(monkeypatch, commands, "prepare", 1)
        found = compare(tmp_path, "single", "ddp")
    elif where == "results":  # the run took it, too late to stop: it is complete
        kill_in(monkeypatch, app, "score_lines", 1)
        found = compare(tmp_path, "single", "ddp")
    else:  # the launch took it and ended its processes, which is no result
        done = Trial("fsdp", 0, "fsdp", config_sha256="f" * 64)
        monkeypatch.setattr(series.Series, "_trained", lambda self, job: done)
        monkeypatch.setattr(commands, "parity", interrupted)
        found = compare(tmp_path, "fsdp", "ddp")
    assert (found.exit_code, found.rows) == (75, [])


def interrupted(*_):
    with Signals():
        os.kill(os.getpid(), signal.SIGTERM)
    return broken()


# -- what is asked for ------------------------------------------------------------------


def read(*words):
    return modes(load(CompareConfig, words, shipped("cfg"), USES))


def test_text_and_mappings_name_the_same_modes(tmp_path):
    file = tmp_path / "three.yaml"
    file.write_text(
        "strategies:\n- centralized\n- {kind: ddp, threads: 1}\n"
        "- {kind: pipeline, stages: [head, neck], schedule: 1f1b}\nstrategy: {processes: 3}\n"
    )
    text = "strategies=centralized,ddp:threads=1,pipeline:stages=head+neck+schedule=1f1b"
    found = read(text, "strategy.processes=3")
    assert found == read(str(file))
    assert [mode.name for mode in found] == [
        *("single", "ddp-threads=1", "pipeline-stages=head+neck+schedule=1f1b")
    ]
    assert [getattr(mode.strategy, "processes", 1) for mode in found] == [1, 3, 3]
    assert (found[2].strategy.stages, found[2].strategy.schedule) == (["head", "neck"], "1f1b")
    own = read("strategies=ddp,ddp:processes=4", "strategy.processes=3")
    assert [mode.strategy.processes for mode in own] == [3, 4]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "strategies: not given; "),
        (["strategies=ddpp"], "strategy: 'ddpp'; did you mean ddp? "),
        (["strategies=single,single"], "strategies: single stands there twice; "),
        (["strategies=single,ddp,ddp:processes=2"], "strategies: ddp-processes=2 is ddp again; "),
        (["strategies=ddp:threads"], "strategies: 'ddp:threads'; write MODE:KEY=VALUE"),
        (["strategies=[{threads: 1}]"], "strategies: {'threads': 1}; begin with a mode"),
        (["strategies=ddp:thread=1"], "strategy.thread: no such key; did you mean "),
        (["strategies=ddp:threads=x"], "strategy.threads: 'x'; "),
        (["strategies=single:threads=1"], "strategy.threads: strategy=single has no such key; "),
        (
            ["strategies=ddp", "strategy.stages=a"],
            "strategy.stages: ['a']; none of ddp has such a key",
        ),
        (["strategies=ddp", "strategy.thread=1"], "strategy.thread: no such key; did you mean "),
        (["strategies=ddp", "strategy=ddp"], "strategy.kind: 'ddp'; it would change nothing here"),
        (["strategies=ddp", "batch=-1"], "batch: -1; what fits differs from mode to mode"),
        (["strategies=single,pipeline", "model=fcos"], "strategy: pipeline, but fcos is one block"),
        (["strategies=ddp", "check_steps=0"], "check_steps: 0; "),
        (["strategies=ddp", "resume=true"], "resume: true without a folder; "),
        (["strategies=ddp", "counts=8"], "counts: it changes nothing without links; "),
        (["strategies=ddp", "links=1gbit", "model=fcos"], "links: fcos is one block, "),
        (["strategies=ddp", "resume=true", "out=x"], "out: x holds no compare.yaml; "),
    ],
)
def test_what_cannot_be_is_told_before_anything_starts(words, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "data=tiny", *words]) == 2
    assert capsys.readouterr().err.startswith(f"visiontrain: {line}")
    assert not list(tmp_path.iterdir())


def test_a_mode_that_is_not_installed_is_told_before_anything_trains(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "flwr" else found(n))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *SMALL, "strategies=single,federated"]) == 2
    assert capsys.readouterr().err.startswith("visiontrain: strategy: federated needs Flower; pip")
    assert not list(tmp_path.iterdir())


def test_under_torchrun_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=r"^compare: under torchrun; "):
        compare(tmp_path / "run", "single")


# -- the table ----------------------------------------------------------------------------


def test_the_table_fits_a_terminal_however_long_names_are():
    row = Row(
        name="ddp-sync_every=1000+outer=diloco+compress=powersgd",
        strategy={"kind": "ddp"},
        processes=64,
        threads=16,
        scores={"map": 0.5, "map50": 0.75},
        seconds=123456.7,
        images_per_s=12345.6,
        bytes_per_step=123456789.0,
        bytes_sent=123456789012,
        peak_rss_mb=123456.0,
        samples=100,
        exactness="different algorithm",
        reasons=["because " * 40],
        check_steps=3,
    )
    alone = replace(row, name="single", strategy={"kind": "single"}, processes=1, samples=99)
    rows = related([alone, row, replace(row, name="p", error="this\nand that")])
    found = table.Comparison(".", rows, 4, "detect", "0" * 64, {}, {}, 1)
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= table.WIDTH
    last = next(i for i, line in enumerate(lines) if line.startswith("p "))
    assert "".join(line.split()[0] for line in lines[2:last]) == row.name
    assert "not all saw as many samples: 99, 100" in lines
    assert "p: this" in lines
