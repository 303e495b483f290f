"""Values that change nothing or cannot be, data sets' advice, and what travels with a run."""

import pytest
import torch
from small import config, prepared

from visiontrain import app, start
from visiontrain.core.config import from_keys, load
from visiontrain.core.errors import ConfigError
from visiontrain.core.yaml_loader import load_yaml
from visiontrain.engine import autobatch
from visiontrain.engine.weights import load_weights
from visiontrain.loggers.console import Silent
from visiontrain.prepare import below, prepare, settled
from visiontrain.recipe import Run
from visiontrain.run_checks import check_values
from visiontrain.scoring import prepare_validation

STAGED = {"kind": "pipeline"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"iou": 0.5}, "task.iou: 0.5; it changes nothing here, add nms=true"),
        ({"optim": {"kind": "sgd", "beta2": 0.9}}, "optim.beta2: 0.9; .* take optim=adamw"),
        (
            {"optim": "muon", "strategy": "fsdp"},
            "optim: muon under strategy=fsdp, where no process holds a whole matrix; take adamw",
        ),
        (
            {"augment": {"multi_scale": 0.2}},
            "augment.multi_scale: 0.2; no other multiple of 32 lies so near to 64, take 0.5",
        ),
        ({"model": {"kind": "yolo_n", "pretrained": "hub"}}, "model.pretrained: hub; .*backbone"),
        ({"ema": False, "optim.ema_window": 0.1}, "optim.ema_window: 0.1; .* ema=true"),
        ({"val": False, "patience": 3}, "patience: 3; .* take val=true"),
        ({"log": {"to": [], "wandb_project": "x"}}, "log.wandb_project: x; .* wandb"),
        ({"batch": 0}, "batch: 0; take 1 or more, or -1"),
        ({"batch": -1, "accumulate": 9}, "accumulate: 9; a batch of 1 images has no more than 1"),
        ({"model": "fcos", "batch": -1}, "batch: -1; what fits is not known of fcos, take a num"),
        ({"model": "fcos", "task.topk": 5}, "task.topk: 5; it changes nothing here, take model=yo"),
        ({"model": "retinanet", "freeze": 1}, "freeze: 1; .* take model.trainable_layers or leave"),
        (
            {"model": "faster_rcnn", "strategy": "pipeline"},
            "strategy: pipeline, but faster_rcnn is one block, which cannot be cut; take strategy",
        ),
        (
            {"strategy": {**STAGED, "processes": 40}},
            "strategy.processes: 40 for a pipeline, .* blo",
        ),
        (
            {"strategy": {**STAGED, "stages": ["up9"]}},
            "strategy.stages: no block 'up9'; blocks are s",
        ),
        (
            {"strategy": {**STAGED, "stages": ["up4"], "processes": 3}},
            r"strategy.stages: \['up4'\]; take 2 different blocks",
        ),
        ({"strategy": {**STAGED, "memory": 1e-4}}, "strategy.memory: 0.0001; no 2 stages"),
        (
            {"strategy": {**STAGED, "stages": ["up4"], "memory": 1e-4}},
            "strategy.memory: 0.0001; stage 0, from stem, needs more",
        ),
        (
            {"strategy": {**STAGED, "schedule": "zbv"}, "recompute": True},
            "recompute: true with strategy.schedule=zbv, which cuts the backward pass",
        ),
        ({"strategy": "placement", "recompute": True}, "recompute: true with strategy=placement"),
        ({"strategy": "placement", "batch": -1}, "batch: -1 with strategy=placement"),
        ({"model": "yolo_n", "model.norm": "sync"}, "model.norm: sync on the CPU; "),
        ({"strategy": "pipeline", "model.norm": "sync"}, "model.norm: sync in a pipeline"),
        ({"strategy": "client", "model.norm": "sync"}, "model.norm: sync under strategy=client, "),
        (
            {"strategy": "client", "device": "cpu,cpu"},
            "device: 'cpu,cpu'; strategy=client takes one",
        ),
        ({"data.cache": "disk"}, "data.cache: disk, but .* has no files; take ram"),
        (
            {"strategy": {"kind": "federated", "clients": 4, "fraction": 0.9}},
            "strategy.fraction: 0.9 of 4 clients are all of them; take 0.75 or less",
        ),
        (
            {"strategy": {"kind": "ddp", "processes": 4, "topology": "hierarchical", "inner": 1}},
            "strategy.topology: hierarchical with 4 processes in groups of 1",
        ),
        ({"accumulate": 9}, "accumulate: 9; a batch of 4 images has no more than 4 parts"),
    ],
)
def test_what_would_change_nothing_is_refused(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        prepare(config(tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"imgsz": 32, "batch": 11}, "batch: 11, but .* last have 1, and at 32 pixels"),
        ({"imgsz": 32, "batch": 7, "accumulate": 3}, "batch: 7, .* have 1, and at 32"),
        ({"batch": 1, "augment": {"multi_scale": 0.5}}, "batch: 1, .* have 1, and at 32"),
        ({"imgsz": 32, "batch": 7, "accumulate": 2}, None),
        ({"imgsz": 32, "batch": 11, "model": {"norm": "group"}}, None),
        ({"imgsz": 64, "batch": 11}, None),
    ],
)
def test_no_statistics_of_a_single_number_are_asked_for(tmp_path, keys, where):
    """torch would refuse in the last step of an epoch of 12 images."""
    if where:
        with pytest.raises(ConfigError, match=f"^{where}"):
            prepared(tmp_path / "run", **keys)
    else:
        prepared(tmp_path / "run", **keys)[1].fit()


def test_a_batch_that_fits_is_chosen_once_and_recorded(tmp_path, monkeypatch):
    keys = {"data": {"source": "tiny", "train_images": 60, "val_images": 2}, "batch": -1}
    run = prepare(config(tmp_path / "run", **keys))
    assert run.batch == 4  # a power of two, and twelve steps an epoch
    assert load_yaml((tmp_path / "run" / "config.yaml").read_text(), "x")["batch"] == 4
    monkeypatch.setattr(autobatch, "free_memory", lambda *_: 0)
    again = config(tmp_path / "run", **keys, resume=True)
    assert prepare(again).batch == 4, "chosen anew"


def test_a_validation_takes_any_batch(tmp_path):
    prepared(tmp_path / "run")[1].fit()
    run = prepare_validation(
        from_keys(Run, {"weights": tmp_path / "run", "batch": -1, "out": tmp_path / "val"})
    )
    assert run.batch == 4  # that of the run, which fits
    keys = {"weights": tmp_path / "run", "split": "train", "out": tmp_path / "seen"}
    assert prepare_validation(from_keys(Run, keys)).data.val_images is None  # says nothing there
    keys = {"weights": tmp_path / "run", "split": "train", "data.val_images": 2}
    with pytest.raises(ConfigError, match=r"data.val_images: 2 with split=train, of which it caps"):
        prepare_validation(from_keys(Run, {**keys, "out": tmp_path / "other"}))
    keys = {"weights": tmp_path / "run", "strategy": "federated", "out": tmp_path / "other"}
    with pytest.raises(ConfigError, match="strategy: federated; nothing is trained here, take si"):
        prepare_validation(from_keys(Run, keys))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("keys", "rate"),
    [
        ({"model": "fcos"}, 1e-4),
        ({"model": "fcos", "optim": "sgd"}, 0.01),
        ({"model": "fcos", "optim.lr": 0.003}, 0.003),
        ({}, 0.002),
    ],
)
def test_the_default_rate_is_one_that_the_model_trains_at(tmp_path, keys, rate):
    assert prepare(config(tmp_path / "run", **keys)).optim.lr == rate


def recommending(folder, text):
    """Write a data set of digits that recommends keys."""
    (folder / "mine.yaml").write_text(
        f"format: digits\ntrain: 4\nval: 2\ncanvas: 64\ndigits: [1, 2]\nheights: [14, 20]\n"
        f"defaults: {text}\n"
    )
    return str(folder / "mine.yaml")


def test_a_data_sets_defaults_follow_the_rules_of_presets(tmp_path):
    source = recommending(tmp_path, "{strategy: ddp, optim: sgd, lr0: 0.5, epochs: 7}")
    words = [f"data={source}", "strategy.processes=3", f"out={tmp_path / 'run'}", "device=cpu"]
    run = prepare(load(Run, words, tmp_path, below=below))
    assert (run.strategy.kind, run.strategy.processes) == ("ddp", 3)
    assert (run.optim.kind, run.optim.lr, run.epochs) == ("sgd", 0.5, 7)
    with pytest.raises(ConfigError, match=r"mine\.yaml: defaults: epoch: no such key"):
        prepare(config(tmp_path / "b", data={"source": recommending(tmp_path, "{epoch: 7}")}))
    with pytest.raises(ConfigError, match=r"mine\.yaml: defaults: out: 'x'; it would change"):
        prepare(config(tmp_path / "b", data={"source": recommending(tmp_path, "{out: x}")}))


def test_caps_on_the_training_data_do_not_travel_to_other_data(tmp_path):
    prepared(tmp_path / "run", epochs=1, **{"data.val_images": 2})[1].fit()
    keys = {"data": {"source": recommending(tmp_path, "{}")}, "weights": tmp_path / "run"}
    run = prepare_validation(from_keys(Run, keys | {"out": tmp_path / "scored"}))
    assert run.data.val_images is None
    same = prepare_validation(
        from_keys(Run, {"weights": tmp_path / "run", "out": tmp_path / "again"})
    )
    assert same.data.val_images == 2


def test_weights_are_taken_whatever_lies_where_the_program_is_started(tmp_path, monkeypatch):
    prepared(tmp_path, epochs=1)[1].fit()
    monkeypatch.chdir(tmp_path)  # ./checkpoints is there
    run = config(None, weights=tmp_path, seed=3)
    model = start.build_fresh(run, list("0123456789"), Silent())
    saved = load_weights(tmp_path).tensors
    assert all(torch.equal(t, saved[name]) for name, t in model.state_dict().items())


def test_the_same_data_under_a_relative_name_keep_what_was_said_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recommending(tmp_path, "{}")
    data = {"source": "mine.yaml", "val_images": 1, "single_cls": True, "workers": 0}
    prepared(tmp_path / "run", data=data, epochs=1)[1].fit()
    keys = {"data": "mine.yaml", "weights": tmp_path / "run", "out": tmp_path / "scored"}
    run = prepare_validation(from_keys(Run, keys))
    assert (run.data.val_images, run.data.single_cls) == (1, True)


def test_a_run_that_goes_on_needs_nothing_that_it_started_from(tmp_path, monkeypatch):
    prepared(tmp_path / "first", epochs=1)[1].fit()
    _, fitter = prepared(tmp_path / "run", epochs=1, weights=tmp_path / "first")
    fitter.fit()
    (tmp_path / "first" / "weights" / "best.safetensors").unlink()
    assert prepared(tmp_path / "run", epochs=2, resume=True)[1].fit().exit_code == 0


@pytest.mark.parametrize("keys", [{"seed": 2**70}, {"data.workers": -1}])
def test_numbers_out_of_range_are_one_line(tmp_path, keys):
    with pytest.raises(ConfigError, match=next(iter(keys))):
        prepare(config(tmp_path / "run", **keys))


def test_images_that_are_dealt_out_are_read_in_no_windows(tmp_path):
    with pytest.raises(ConfigError, match=r"^data.window: 4; strategy=client has no such, leave"):
        check_values(config(tmp_path, strategy="client", **{"data.window": 4}))


def test_a_cache_in_memory_is_not_filled_to_be_read_once(tmp_path):
    prepared(tmp_path / "run", epochs=1, **{"data.cache": "ram"})[1].fit()
    run = prepare_validation(from_keys(Run, {"weights": tmp_path / "run", "out": tmp_path / "val"}))
    assert (run.data.cache, run.data.source) == ("none", config(tmp_path).data.source)


def test_a_backbone_that_weights_lack_comes_pretrained(tmp_path, monkeypatch):
    """Only a plain network's neck and head fit a detector on another backbone."""
    prepared(tmp_path / "plain")[1].fit()
    wide = {"model": {"kind": "yolo_n", "backbone": "resnet18"}}
    asked = []

    def pretrained(model):
        asked.append(model.backbone)
        return {name: torch.full_like(t, 7) for name, t in body.items()}

    monkeypatch.setattr(start, "pretrained", pretrained)
    run = config(tmp_path / "new", weights=str(tmp_path / "plain"), **wide)
    fresh = start.build_fresh(run, list("0123456789"), None)
    body = {n: t for n, t in fresh.state_dict().items() if n.startswith(fresh.body)}
    model = start.build_fresh(run, list("0123456789"), Silent()).state_dict()
    assert asked == ["resnet18"]
    assert all((model[name] == 7).all() for name in body)
    plain = load_weights(str(tmp_path / "plain")).tensors
    taken = [n for n, t in model.items() if n in plain and t.shape == plain[n].shape]
    assert all(torch.equal(model[name], plain[name]) for name in taken)
    assert len(taken) > 20
    own = config(tmp_path / "own", weights=str(tmp_path / "plain"))
    start.build_fresh(own, list("0123456789"), Silent())
    assert asked == ["resnet18"]  # what has a body is not given another


def test_the_model_is_that_of_the_weights_unless_another_is_asked_for(tmp_path):
    keys = {"model": {"kind": "yolo_n", "norm": "group", "finest": 4}, "precision": "fp64"}
    prepared(tmp_path / "first", epochs=1, **keys)[1].fit()
    again = {"weights": str(tmp_path / "first")}
    assert (
        settled(config(tmp_path / "a", **again)).model
        == settled(config(tmp_path / "first", **keys)).model
    )
    assert settled(config(tmp_path / "b", model="yolo_s", **again)).model.norm == "batch"
    changed = settled(config(tmp_path / "c", **again, **{"model.norm": "frozen"})).model
    assert (changed.norm, changed.finest) == ("frozen", 4)
    # So do the precision, and no cap of val where another split is scored.
    for split, most in (("val", 4), ("test", None)):
        given = {"weights": tmp_path / "first", "out": tmp_path / split, "split": split}
        run = prepare_validation(from_keys(Run, given))
        assert (run.precision, run.data.val_images) == ("fp64", most)


def test_home_is_meant_wherever_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    prepared("~/run", epochs=1)[1].fit()
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert not (tmp_path / "~").exists()
    run = prepare_validation(from_keys(Run, {"weights": "~/run", "project": "~/scores"}))
    assert run.out == str(tmp_path / "scores" / "detect" / "val")
    assert run.data.source == config(tmp_path).data.source
    assert prepare(config("~/run", epochs=2, resume="auto")).resume


def test_a_rate_of_sgd_is_told_beside_adamw(tmp_path, monkeypatch):
    said = []

    class Told(Silent):
        def message(self, text):
            said.append(text)

    monkeypatch.setattr(app, "build_progress", lambda _: Told())
    prepared(tmp_path / "plain")
    assert not any("rate for SGD" in line for line in said)
    prepared(tmp_path / "high", lr0=0.01)
    assert any(line.startswith("optim.lr=0.01 is a rate for SGD") for line in said)
