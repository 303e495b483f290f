"""Config: what may be typed, what it means, and what an error says."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from visiontrain.compare_config import CompareConfig
from visiontrain.core.config import build, from_keys, load, merge
from visiontrain.core.errors import ConfigError
from visiontrain.core.keys import ALIASES
from visiontrain.core.section import all_keys, annotation_of
from visiontrain.core.shipped import presets, shipped
from visiontrain.core.yaml_loader import dump_yaml, load_yaml
from visiontrain.predict_config import PredictConfig
from visiontrain.recipe import USES, Run

PRESETS = shipped("cfg")


def typed(*words):
    return load(Run, words, PRESETS).model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    ("words", "want"),
    [
        (["epochs=5", "batch=4"], {"epochs": 5, "batch": 4}),
        (["--epochs", "5", "--batch=4"], {"epochs": 5, "batch": 4}),
        (["epochs", "=", "5"], {"epochs": 5}),
        (["rect=false", "half=False", "exist_ok=false", "save_period=-1", "dropout=0.0"], {}),
        (["data=my.yaml"], {"data": {"source": "my.yaml"}}),
        (["strategy=centralized"], {"strategy": {"kind": "single"}}),
        (
            ["strategy.processes=3", "strategy=ddp"],
            {"strategy": {"kind": "ddp", "processes": 3}},
        ),
        (["lr0=1e-3", "optimizer=AdamW"], {"optim": {"lr": 0.001, "kind": "adamw"}}),
        (["cos_lr=false", "amp=false"], {"optim": {"schedule": "linear"}, "precision": "fp32"}),
        (["device=0,1"], {"device": "0,1"}),
        (["device=0", "name=12"], {"device": "0", "name": "12"}),
        (["log.to=[console, wandb]"], {"log": {"to": ["console", "wandb"]}}),
        (["log.to=console,wandb"], {"log": {"to": ["console", "wandb"]}}),
        (["log.to=wandb"], {"log": {"to": ["wandb"]}}),
        (
            ["task=classify", "task.class_weights=1,2.5"],
            {"task": {"kind": "classify", "class_weights": [1.0, 2.5]}},
        ),
        (["weights=null"], {"weights": None}),
        (["modes/ddp", "strategy.processes=4"], {"strategy": {"kind": "ddp", "processes": 4}}),
        (["ddp", "strategy=fsdp"], {"strategy": {"kind": "fsdp", "processes": 2}}),
        (["ddp", "strategy=single"], {"strategy": {"kind": "single"}}),
        (["strategy.processes=4", "modes/fsdp"], {"strategy": {"kind": "fsdp", "processes": 4}}),
        (["strategy.kind=centralized"], {"strategy": {"kind": "single"}}),
        (
            ["strategy=pipeline", "strategy.stages=auto"],
            {"strategy": {"kind": "pipeline", "stages": "auto"}},
        ),
        (["augment=none"], {"augment": {"kind": "none"}}),
        (["mosaic=0.5"], {"augment": {"kind": "standard", "mosaic": 0.5}}),
        (["optim={kind: sgd, lr: 1e-2}"], {"optim": {"kind": "sgd", "lr": 0.01}}),
        (["data=images/*.yaml"], {"data": {"source": "images/*.yaml"}}),
        (["name=a: [b", "out="], {"name": "a: [b", "out": None}),
        (["epochs=2", "epochs=3"], {"epochs": 3}),  # as in a shell's history: the last one holds
        (["amp=false", "precision=fp32"], {"precision": "fp32"}),
    ],
)
def test_words_become_keys(words, want):
    assert typed(*words) == want


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch=5"], "epoch: no such key; did you mean epochs?"),
        (["EPOCHS=5"], "EPOCHS: no such key; did you mean epochs?"),
        (["momentun=1"], "momentun: no such key; did you mean momentum?"),
        (["optim.learning=1"], "optim.learning: no such key; "),
        (["strategy=dpp"], "strategy: 'dpp'; did you mean ddp? take one of single, ddp, "),
        (["optim.kind=adam"], "optim.kind: 'adam'; did you mean adamw? take one of auto, adamw"),
        (["epochs=ten"], "epochs: 'ten'; input should be a valid integer"),
        (["epochs=0"], "epochs: 0; input should be greater than or equal to 1"),
        (["imgsz=100"], "imgsz: 100; input should be a multiple of 32"),
        (["strategy.processes=2"], "strategy.processes: strategy=single has no such key; "),
        (
            ["augment=none", "fliplr=0.1"],
            "augment.fliplr: augment=none has no such key; augment=st",
        ),
        (["augment=none", "augment.flplr=0.1"], "augment.flplr: no such key; did you mean "),
        (["--epochs"], "--epochs: no value; write epochs=VALUE"),
        (["--resume", "--epochs", "5"], "--resume: no value; write resume=VALUE"),
        (["epochs"], "epochs: no value; write epochs=VALUE"),
        (["save=5"], "save: 5; write save.every_epochs=VALUE"),
        (["perspective=0.0005"], "perspective: no such key; did you mean augment.perspective?"),
        (["bgr=0.1"], "bgr: no such key; there is no such augmentation yet"),
        (
            ["rect=true", "epochs=3", "half=true", "exist_ok=false"],
            "rect: no such key, images are always padded to squares; half: no such key, training",
        ),
        (["cutmix=0.1"], "augment.cutmix: augment=standard has no such key; augment=classify has"),
        (["label_smoothing=0.1"], "task.smoothing: task=detect has no such key; task=classify has"),
        (
            ["model=best.pt"],
            "model: best.pt; weights=FILE starts from one of ours, files of other tools",
        ),
        (
            ["precision=bf16", "amp=false"],
            "amp: precision=fp32, but precision made it bf16; they are one key, leave one out",
        ),
        (["lr0=0.1", "optim.lr=0.2"], "optim.lr: optim.lr=0.2, but lr0 made it 0.1; they are"),
        (["optimizer=sgd", "optim=muon"], "optim: optim.kind=muon, but optimizer made it sgd; "),
        (["/tmp"], "/tmp: a folder, and no key=value; for a data set write data=/tmp"),
        (["workers=many"], "data.workers: 'many'; input should be a valid integer or 'auto'"),
        (["lr0=1e999"], "optim.lr: inf; input should be a finite number"),
        (["cos_lr=[1]"], "optim.schedule: [1]; take one of linear, cosine, constant"),
        (
            ["strategy=pipeline", "strategy=ddp", "strategy.stages=[a]"],
            "strategy.stages: strategy=ddp",
        ),
        (
            ["detect/yolo_m"],
            "detect/yolo_m: no such file or preset, and no key=value; did you mean ",
        ),
        (["ema=yes"], "ema: 'yes'; take true or false"),
    ],
)
def test_errors_are_one_line_with_where_what_and_what_would_do(words, message):
    with pytest.raises(ConfigError) as caught:
        typed(*words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_choice_that_only_python_can_make_is_not_named():
    with pytest.raises(ConfigError, match=r"^model.head: model=resnet_tiny has .* yolo_x has$"):
        typed("model=resnet_tiny", "model.head=nms")


def test_an_object_that_is_typed_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"^model.own: an object of yours; pass it in Python"):
        typed("model.own=x")


def test_a_file_is_one_though_a_run_has_its_keys_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = Path("single-seed=0/config.yaml")
    file.parent.mkdir()
    file.write_text("epochs: 7\n")
    assert typed(str(file), "batch=3") == {"epochs": 7, "batch": 3}
    with pytest.raises(ConfigError, match="single-seed: no such key"):
        typed(str(file.with_name("gone.yaml")))


def test_later_words_win_over_presets_and_presets_may_extend(tmp_path):
    (tmp_path / "base.yaml").write_text("epochs: 7\nbatch: 3\noptim: {lr: 1e-3}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nbatch: 5\noptim: {momentum: 0.5}\n")
    got = typed(str(tmp_path / "mine.yaml"), "epochs=9")
    assert got == {"epochs": 9, "batch": 5, "optim": {"lr": 0.001, "momentum": 0.5}}


@pytest.mark.parametrize("path", presets(PRESETS).values(), ids=lambda p: p.stem)
def test_every_preset_loads(path):
    root = CompareConfig if path.parent.name == "compare" else Run
    assert load(root, [str(path)], PRESETS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epoch: 7", "mine.yaml: epoch: no such key; did you mean epochs?"),
        (b"epochs: ten", "mine.yaml: epochs: 'ten'; input should be a valid integer"),
        (b"extends: mine.yaml", "mine.yaml: extends more than 8 deep; does it extend itself?"),
        (b"extends: yolo_x", "yolo_x: no such file or preset"),
        (b"- epochs", "mine.yaml: a list; write key: value lines"),
        (b"epochs: \xff", "mine.yaml: 'utf-8' codec can't decode byte 0xff"),
        (b"epochs: 1\nbatch: [", "mine.yaml:2: "),
    ],
)
def test_what_is_wrong_with_a_preset_names_the_file(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        typed("mine.yaml", "batch=4")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_preset_may_hold_what_a_verb_has_no_use_for_but_nobody_may_type_it(tmp_path):
    (tmp_path / "mine.yaml").write_text("epochs: 7\n")
    words = [str(tmp_path / "mine.yaml"), "weights=x", "conf=0.1"]
    assert load(Run, words, PRESETS, USES["val"]).epochs == 7
    assert load(Run, [*words, "strategy=ddp"], PRESETS, USES["val"]).strategy.kind == "ddp"
    typed = ("epochs=7", "model=yolo_s", "task={box: 1}", "strategy.reduce=bf16")
    for word in (*typed, "strategy.schedule=1f1b", "strategy.compress=topk"):
        with pytest.raises(ConfigError, match="would change nothing here"):
            load(Run, [*words, word], PRESETS, USES["val"])


@pytest.mark.parametrize("verb", USES)
def test_what_verbs_use_are_keys(verb):
    assert set(USES[verb]) <= set(all_keys(Run))


KEYS = [*all_keys(Run), *ALIASES, "", ".", "a.b", "strategy.kind.x"]
VALUES = [
    "null",
    "-1",
    "[1]",
    "{a: 1}",
    "{kind: ddp}",
    "[" * 3000,
    "&a [*a]",
    "!!set {a}",
    "1" * 5000,
]
WORDS = st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES) | st.text()).map("=".join)


@settings(max_examples=300)
@given(st.lists(WORDS | st.text(), max_size=3))
@example(["\x00"])
@example(["/"])
@example(["a" * 5000])
def test_whatever_is_typed_is_a_config_or_one_line(words):
    try:
        load(Run, words, PRESETS)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


def test_every_alias_leads_to_a_key():
    assert all(annotation_of(Run, key) is not None for key, _ in ALIASES.values())


def test_python_values_follow_the_same_rules():
    run = from_keys(Run, {"data": "tiny", "optim.lr": 0.1, "lrf": 0.5, "out": Path("x")})
    assert (run.data.source, run.optim.lr, run.optim.lr_final, run.out) == ("tiny", 0.1, 0.5, "x")


def test_the_config_round_trips_through_yaml():
    run = load(Run, ["strategy=pipeline", "strategy.stages=[up4]", "lr0=1e-5", "time=0.5"], PRESETS)
    assert Run.model_validate(load_yaml(dump_yaml(run.model_dump()), "x")) == run


def test_no_augmentation_drops_what_a_data_set_recommends():
    recommended = {"imgsz": 160, "augment": {"mosaic": 0.0, "scale": 0.2}}
    run = build(Run, merge(Run, recommended, typed("augment=none")))
    assert (run.imgsz, run.augment.model_dump()) == (160, {"kind": "none", "own": None})
    run = build(Run, merge(Run, recommended, typed("augment.scale=0.3")))
    assert (run.augment.kind, run.augment.mosaic, run.augment.scale) == ("standard", 0.0, 0.3)


def test_required_keys_are_asked_for():
    with pytest.raises(ConfigError, match="weights: not given; add weights=VALUE"):
        load(PredictConfig, ["source=x"], PRESETS)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("no", "no"),
        ("on", "on"),
        ("007", "007"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0x10", 16),
        ("-4", -4),
        ("~", None),
        ("", None),
        ("True", True),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1.2.3", "1.2.3"),
    ],
)
def test_scalars_are_read_as_yaml_1_2(text, value):
    got = load_yaml(text, "x")
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: [1",
        "!!python/object/apply:os.system ['true']",
        "a: &a [x, x]\n" + "\n".join(f"b{i}: *a" for i in range(60)),
        "a: &a [*a]",
        "[" * 1000,
        "a: !!timestamp tomorrow",
        "a: \x00",
        "1" * 5000,
    ],
)
def test_yaml_that_hides_something_is_refused(text):
    with pytest.raises(ConfigError, match=r"^file\.yaml.*; write plain YAML$"):
        load_yaml(text, "file.yaml")


def test_what_is_dumped_loads_the_same():
    tree = {"a": "no", "b": "1e-3", "c": "007", "d": "null", "e": [1e-7, True, None], "f": "ü: x"}
    assert load_yaml(dump_yaml(tree), "x") == tree


def test_no_key_is_ambiguous_with_a_short_name():
    assert not set(ALIASES) & {key for key in all_keys(Run) if "." not in key}
