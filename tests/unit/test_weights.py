import json
import os

import pytest
import torch
from safetensors.torch import save_file

from visiontrain.core import durable
from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.core.types import ClassRows
from visiontrain.engine.weights import (
    RGB,
    Weights,
    WeightsMeta,
    floats_of,
    load_weights,
    save_weights,
    start_from,
)

META = WeightsMeta(task="detect", model={"kind": "yolo_n"}, names=["cat", "dog"], imgsz=64)
ROWS = dict.fromkeys(("cls.weight", "cls.bias"), ClassRows())


def tensors(classes, value):
    return {
        "stem.weight": torch.full((4, 3), value),
        "cls.weight": torch.full((classes, 4), value) + torch.arange(classes)[:, None],
        "cls.bias": torch.full((classes,), value) + torch.arange(classes),
    }


def test_a_file_says_what_it_is(tmp_path):
    path = tmp_path / "weights" / "best.safetensors"
    meta = WeightsMeta(**{**vars_of(META), "metrics": {"map": 0.1 + 0.2}, "epoch": 3})
    save_weights(path, meta, tensors(2, 0.5))
    for where in (path, tmp_path, str(tmp_path)):  # the file, or the run's folder
        found = load_weights(where)
        assert found.meta == meta
        assert torch.equal(found.tensors["cls.weight"], tensors(2, 0.5)["cls.weight"])
    assert json.loads(path.with_suffix(".json").read_text()) == vars_of(meta)


def vars_of(meta):
    return {name: getattr(meta, name) for name in meta.__slots__}


def test_what_is_no_weights_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.safetensors not found"):
        load_weights(tmp_path / "none.safetensors")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no tensors here, only words")
    with pytest.raises(CheckpointError, match="no intact safetensors file"):
        load_weights(junk)
    save_file(tensors(2, 0.5), junk)
    with pytest.raises(CheckpointError, match="without visiontrain"):
        load_weights(junk)
    save_file(tensors(2, 0.5), junk, {"visiontrain": '{"schema": 99}'})
    with pytest.raises(CheckpointError, match="schema 99"):
        load_weights(junk)


def test_a_run_without_weights_says_how_to_come_by_them(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()

    def told():
        with pytest.raises(CheckpointError, match=r"^[^\n]*$") as caught:
            load_weights(run)
        return str(caught.value)

    assert told() == (
        f"weights: {run} holds no weights; give a .safetensors file or the folder of a training run"
    )
    (run / "config.yaml").write_text("epochs: 9\n")
    assert told() == (
        f"weights: {run} holds no weights yet; wait for its run, or go on with it: "
        f"`visiontrain train out='{run}' resume=true`"
    )
    (run / "metrics.json").write_text("{}")  # a validation's folder: nothing to go on with
    assert "resume" not in told()
    last = run / "weights" / "last.safetensors"
    save_weights(last, META, tensors(2, 0.5))  # with val=false, until the end
    assert told().endswith(f"holds no best weights: its run has scored none yet; give {last}")
    assert load_weights(last).meta == META


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"task": "segment"}, "task 'segment', which this version can't use"),
        ({"task": ["detect"]}, "a header without"),
        ({"norm": {**RGB, "order": "BGR"}}, "norm {'order': 'BGR', "),
        ({"norm": {**RGB, "mean": [0.5, 0.5, 0.5]}}, "norm {'order': 'RGB', 'mean': [0.5,"),
        ({"norm": None}, "norm None, "),
        ({"names": None}, "names None, "),
        ({"names": []}, r"names [], "),
        ({"names": [1, 2]}, "names [1, 2], "),
        ({"model": "yolo_n"}, "model 'yolo_n', "),
        ({"task_config": None}, "task_config None, "),
        ({"imgsz": 0}, "imgsz 0, "),
        ({"imgsz": None}, "imgsz None, "),
        ({"later": 1}, "a header without"),
    ],
)
def test_metadata_that_would_be_misread_is_one_line(change, told, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file(tensors(2, 0.5), path, {"visiontrain": json.dumps(vars_of(META) | change)})
    with pytest.raises(CheckpointError, match=r"^[^\n]*odd\.safetensors has [^\n]*$") as caught:
        load_weights(path)
    assert f"has {told}" in str(caught.value)


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "best.safetensors"
    save_weights(path, META, tensors(2, 0.5))

    def full(handle):
        raise OSError(durable.errno.ENOSPC, os.strerror(durable.errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(StorageError, match="no space left"):
        save_weights(path, META, tensors(2, 0.9))
    assert load_weights(path).tensors["stem.weight"][0, 0] == 0.5


def test_class_rows_follow_their_names():
    own = tensors(3, 10.0)
    started = start_from(Weights(META, tensors(2, 0.0)), own, ["dog", "bird", "cat"], ROWS)
    assert started.tensors["cls.bias"].tolist() == [1.0, 11.0, 0.0]
    assert started.tensors["cls.weight"][:, 0].tolist() == [1.0, 11.0, 0.0]
    assert started.tensors["stem.weight"].eq(0).all()
    assert started.line == "weights: took 3 of 3 tensors; class rows by name for 2 of 3 classes"


def test_branches_of_another_width_are_told():
    theirs = {**tensors(2, 0.0), "cls.weight": torch.zeros(2, 9)}
    started = start_from(Weights(META, theirs), tensors(3, 10.0), ["dog", "bird", "cat"], ROWS)
    assert started.tensors["cls.weight"].eq(tensors(3, 10.0)["cls.weight"]).all()
    assert "; class branches of another width, made anew; not taken: cls.weight" in started.line


def test_equally_many_other_classes_are_not_taken_for_the_same():
    started = start_from(Weights(META, tensors(2, 0.0)), tensors(2, 10.0), ["dog", "cow"], ROWS)
    assert started.tensors["cls.bias"].tolist() == [1.0, 11.0]


def test_what_does_not_fit_stays_and_is_said():
    own = {**tensors(2, 10.0), "new": torch.full((1,), 7.0)}
    theirs = {**tensors(2, 0.0), "old": torch.zeros(1)}
    started = start_from(Weights(META, theirs), own, ["x", "y"], ROWS)
    for name in ("cls.weight", "cls.bias", "new"):
        assert torch.equal(started.tensors[name], own[name])
    assert started.line == (
        "weights: took 1 of 4 tensors; class rows by name for 0 of 2 classes; "
        "not taken: cls.weight, cls.bias, new; not used: 1 of the file's, such as old"
    )


def test_nothing_that_fits_is_an_error():
    with pytest.raises(CheckpointError, match=r"not one of 3 tensors fits.*yolo_n"):
        start_from(Weights(META, tensors(2, 0.0)), {"other": torch.zeros(1)}, ["cat"], ROWS)


def test_the_same_classes_are_taken_whole():
    started = start_from(Weights(META, tensors(2, 0.0)), tensors(2, 9.0), META.names, ROWS)
    assert all(torch.equal(started.tensors[k], v) for k, v in tensors(2, 0.0).items())
    assert started.line == "weights: took 3 of 3 tensors"


def test_double_precision_becomes_single():
    halves = floats_of({"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1).long()})
    assert halves["a"].dtype == torch.float32
    assert halves["b"].dtype == torch.int64
