import csv
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from layouts import write_yolo
from small import config, digests, prepared, watched

from visiontrain import app, commands
from visiontrain.core.config import from_keys, load
from visiontrain.core.errors import CheckpointError, ConfigError, StorageError
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Place
from visiontrain.engine.checkpoint import WHOLE, CheckpointStore
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.saving import Saver
from visiontrain.prepare import below, prepare
from visiontrain.recipe import USES, Run
from visiontrain.strategies.comm import broadcast_json

CPU = Place(torch.device("cpu"))
ROOT = Path(__file__).parents[2]
EVERY_STEP = {"log.every": 1, "save.keep": 9}
TIMES = {"seconds", "images_per_s", "data_wait"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    prepared(out, **EVERY_STEP)[1].fit()
    return out


def rows_without_times(out):
    with RunFolder(out).results.open() as file:
        return [{k: v for k, v in r.items() if k not in TIMES} for r in csv.DictReader(file)]


def stopped(out, number, step, **keys):
    """Train until `step` steps are done, then send the process a signal; return the outcome."""
    _, fitter = prepared(out, **EVERY_STEP, **keys)
    watch = watched(fitter, lambda done: os.kill(os.getpid(), number) if done == step else None)
    return fitter.fit(), watch


def resumed(out, **keys):
    _, fitter = prepared(out, **EVERY_STEP, resume=True, **keys)
    watch = watched(fitter)
    return fitter.fit(), watch, fitter


@pytest.mark.parametrize(
    ("number", "code", "step"),
    [(signal.SIGTERM, 75, 2), (signal.SIGUSR1, 75, 3), (signal.SIGINT, 130, 4)],
)
def test_a_signal_saves_in_mid_epoch_and_resume_is_bit_identical(
    tmp_path, whole, number, code, step
):
    out = tmp_path / "run"
    outcome, watch = stopped(out, number, step)
    assert outcome.exit_code == code
    again = f"visiontrain train out={out} resume=true"
    assert watch.lines[-1] == f"saved at step {step}; go on with: {again}"
    assert not RunFolder(out).metrics.exists()
    outcome, watch, _ = resumed(out)
    assert outcome.exit_code == 0
    assert watch.lines[0].startswith("going on, from ")
    assert digests(out) == digests(whole)
    assert rows_without_times(out) == rows_without_times(whole)


@pytest.mark.parametrize("background", [True, False])
def test_saving_beside_training_changes_nothing(tmp_path, whole, background):
    keys = {"save.every_steps": 1, "save.background": background}
    assert stopped(tmp_path, signal.SIGTERM, 2, **keys)[0].exit_code == 75
    resumed(tmp_path, **keys)
    assert rows_without_times(tmp_path) == rows_without_times(whole)
    ends = [RunFolder(out).checkpoints / "step-000006" for out in (tmp_path, whole)]
    for file in WHOLE.values():
        one, other = ((end / file).read_bytes() for end in ends)
        assert one == other


def test_a_signal_without_room_to_save_says_so(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("checkpoints: no space left")

    _, fitter = prepared(tmp_path, **EVERY_STEP)

    def act(done):
        if done == 1:
            monkeypatch.setattr(CheckpointStore, "save", full)
            os.kill(os.getpid(), signal.SIGTERM)

    watched(fitter, act)
    assert fitter.fit().exit_code == 128 + signal.SIGTERM


def test_killed_runs_reach_the_same_weights():
    command = [sys.executable, str(ROOT / "tools" / "crash"), "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills in" in done.stdout


def test_a_flipped_bit_costs_some_steps_and_no_accuracy(tmp_path, whole):
    out = tmp_path / "run"
    stopped(out, signal.SIGTERM, 4)
    file = RunFolder(out).checkpoints / "step-000004" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    _, watch, _ = resumed(out)
    assert "step-000004" in watch.lines[0]
    assert "sha256" in watch.lines[0]
    assert watch.lines[1].endswith("step-000003")
    assert max(path.name for path in file.parents[1].glob("step-*")) == "step-000006"
    assert digests(out) == digests(whole)


def test_a_smaller_keep_makes_room_before_anything_is_written(tmp_path, monkeypatch):
    """What the message of a full disk advises."""
    stopped(tmp_path, signal.SIGTERM, 4)
    _, fitter = prepared(tmp_path, resume=True, **EVERY_STEP | {"save.keep": 1})
    left = []
    save = CheckpointStore.save

    def look(store, snapshot):
        left.append(sorted(path.name for path in store.folder.glob("step-*")))
        return save(store, snapshot)

    monkeypatch.setattr(CheckpointStore, "save", look)
    fitter.fit()
    assert left[0] == ["step-000004"]


def test_a_complete_run_only_writes_its_results_again(tmp_path):
    prepared(tmp_path)[1].fit()
    before = digests(tmp_path)
    RunFolder(tmp_path).metrics.unlink()
    _, watch, fitter = resumed(tmp_path)
    assert not watch.rows
    assert fitter.learner.step == 6
    assert RunFolder(tmp_path).metrics.is_file()
    assert digests(tmp_path) == before


def test_what_fixes_the_place_in_the_data_cannot_change(tmp_path):
    run, _ = prepared(tmp_path)
    before = RunFolder(tmp_path).config.read_text()
    with pytest.raises(ConfigError, match="batch: 2, but the run in out has 4"):
        prepare(config(tmp_path, batch=2, resume=True))
    assert RunFolder(tmp_path).config.read_text() == before
    app.build(run, CPU).fit()
    with pytest.raises(CheckpointError, match="its seed is 0, this run's is 1"):
        app.build(run.model_copy(update={"seed": 1, "resume": True}), CPU).fit()


def test_a_run_goes_on_with_the_labels_it_began_with(tmp_path):
    source = write_yolo(tmp_path / "boxes")
    keys = {"data": {"source": source, "workers": 0}, "batch": 2, "epochs": 1}
    _, trainer = prepared(tmp_path / "run", **keys)
    trainer.fit()
    label = tmp_path / "boxes" / "labels" / "train" / "b.txt"
    label.write_text(label.read_text().replace("1 ", "0 ", 1))
    with pytest.raises(CheckpointError, match="its labels_sha256 is"):
        prepared(tmp_path / "run", **keys, resume=True)[1].fit()


def test_results_without_checkpoints_are_not_begun_over(tmp_path):
    prepared(tmp_path, epochs=1)[1].fit()
    results = (tmp_path / "results.csv").read_text()
    shutil.rmtree(tmp_path / "checkpoints")
    for resume in (True, "auto"):
        with pytest.raises(ConfigError, match=r"holds results.csv but no checkpoint to go on from"):
            prepare(config(tmp_path, epochs=1, resume=resume))
    assert (tmp_path / "results.csv").read_text() == results


def test_a_run_goes_on_where_its_data_have_moved(tmp_path):
    source = write_yolo(tmp_path / "boxes")
    keys = {"batch": 2, "epochs": 1}
    prepared(tmp_path / "run", data={"source": source, "workers": 0}, **keys)[1].fit()
    (tmp_path / "boxes").rename(tmp_path / "elsewhere")
    moved = {"source": source.replace("boxes", "elsewhere"), "workers": 0}
    keys = {"batch": 2, "epochs": 2, "resume": True}
    assert prepared(tmp_path / "run", data=moved, **keys)[1].fit().exit_code == 0


def test_what_an_earlier_version_did_not_write_is_no_difference(tmp_path, monkeypatch):
    """As it had no `depth` of resnet_tiny, and kept the name of a model of the user's."""
    made = Saver.__init__

    def earlier(self, learner, folder, meta, config, fixed):
        model = {key: value for key, value in fixed["model"].items() if key != "finest"}
        old = {key: value for key, value in fixed.items() if key != "labels_sha256"}
        made(self, learner, folder, meta, config, old | {"model": model | {"own": {"ref": "a:b"}}})

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "__init__", earlier)
        prepared(tmp_path, epochs=1)[1].fit()
    run, trainer = prepared(tmp_path, epochs=2, resume=True)
    assert trainer.fit().exit_code == 0
    changed = run.model_copy(update={"model": run.model.model_copy(update={"norm": "group"})})
    with pytest.raises(CheckpointError, match=r"its model is .*'norm': 'batch'"):
        app.build(changed, CPU).fit()


def test_resume_takes_the_runs_own_config(tmp_path):
    prepare(config(tmp_path, epochs=7, **{"optim.lr": 0.005}))
    run = prepare(from_keys(Run, {"out": tmp_path, "resume": True, "patience": 3}))
    assert (run.epochs, run.optim.lr, run.patience) == (7, 0.005, 3)


def again(out, *words):
    """Read words as the program does, for the run in `out`."""
    return load(Run, [f"out={out}", "resume=true", *words], shipped("cfg"), USES["train"], below)


def test_keys_of_the_runs_own_kinds_need_no_kind(tmp_path):
    prepare(config(tmp_path, strategy="ddp", optim={"kind": "sgd", "lr": 0.1}))
    run = prepare(again(tmp_path, "strategy.processes=3", "optim.lr_final=0.5"))
    assert (run.strategy.kind, run.strategy.processes) == ("ddp", 3)
    assert (run.optim.kind, run.optim.lr, run.optim.lr_final) == ("sgd", 0.1, 0.5)


@pytest.mark.parametrize(("kind", "sharded"), [("ddp", False), ("fsdp", True)])
def test_another_mode_leaves_the_shards_of_fsdp(tmp_path, kind, sharded):
    prepare(config(tmp_path, strategy="fsdp", **{"save.sharded": True}))
    assert prepare(again(tmp_path, f"strategy={kind}")).save.sharded == sharded
    assert prepare(again(tmp_path, "strategy.processes=3")).save.sharded


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.norm=frozen", r"model: \{.*'norm': 'frozen'"),
        ("optim=sgd", "optim.kind: sgd, but the run in out has adamw"),
        ("ema=false", "ema: False, but the run in out has True"),
        ("freeze=1", "freeze: 1, but the run in out has 0"),
    ],
)
def test_what_a_runs_state_hangs_on_stays(tmp_path, word, message):
    prepare(config(tmp_path))
    with pytest.raises(ConfigError, match=message):
        prepare(again(tmp_path, word))


def test_a_resume_that_fails_leaves_the_runs_config(tmp_path, monkeypatch):
    prepared(tmp_path)[1].fit()
    before = RunFolder(tmp_path).config.read_text()
    monkeypatch.setattr(Saver, "newest", broken)
    with pytest.raises(CheckpointError, match="another run"):
        commands.train(config(tmp_path, resume=True, epochs=9))
    assert RunFolder(tmp_path).config.read_text() == before


def broken(_):
    raise CheckpointError("checkpoints: of another run")


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.yaml"):
        prepare(config(tmp_path / "nowhere", resume=True))
    for resume in (True, "auto"):
        with pytest.raises(ConfigError, match="add out=DIR"):
            prepare(config(None, resume=resume))
    assert prepare(config(tmp_path, resume=True)).out == str(tmp_path)  # killed at once


# -- another mode ---------------------------------------------------------------------

EXACT = {"precision": "fp64", "model.norm": "group", "val": False, "optim.warmup": 0.0}


def mode_of(kind, rank, world):
    shard = (0, 1) if kind in ("single", "pipeline") else (rank, world)
    return Place(torch.device("cpu"), rank, world, shard, is_main=rank == 0)


def go_on(out, kind, epochs):
    """Be one rank of a run that goes on, for one more epoch, in another mode."""
    keys = dict(EXACT, epochs=epochs, resume=True, strategy=kind)
    if kind == "fsdp":
        keys["save.sharded"] = True
    # Where to cut a model is measured: the main process settles the run for all.
    text = prepare(config(out, **keys)).model_dump_json() if dist.get_rank() == 0 else None
    run = Run.model_validate_json(broadcast_json(text))
    app.build(run, mode_of(kind, dist.get_rank(), dist.get_world_size())).fit()


def test_a_run_goes_on_in_every_other_mode(ranks, tmp_path):
    """ddp, one device, fsdp, pipeline: each takes the checkpoint of the one before."""
    paths = {"mixed": tmp_path / "mixed", "single": tmp_path / "single"}
    for epochs, kind in enumerate(["ddp", "single", "fsdp", "pipeline"], 1):
        for name, out in paths.items():
            out.mkdir(exist_ok=True)
            if name == "mixed" and kind != "single":
                ranks(2).run(go_on, out, kind, epochs)
            else:
                prepared(out, **EXACT, epochs=epochs, resume=True, strategy="single")[1].fit()
    stores = [CheckpointStore(RunFolder(out).checkpoints, 1) for out in paths.values()]
    mixed, single = (store.newest().snapshot for store in stores)
    assert mixed.step == single.step == 12
    for part in ("model", "ema", "optimizer"):
        assert mixed.tensors[part].keys() == single.tensors[part].keys()
        for name, tensor in mixed.tensors[part].items():
            assert torch.allclose(tensor, single.tensors[part][name], rtol=0, atol=1e-7), name
