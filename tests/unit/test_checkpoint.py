import errno
import json
import os
import subprocess

import pytest
import torch

from visiontrain.core import durable
from visiontrain.core.durable import write_file
from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.engine import checkpoint
from visiontrain.engine.checkpoint import PARTS, CheckpointStore, Snapshot, read

SIZE = 3
FILES = (*checkpoint.SMALL, *checkpoint.WHOLE.values())


def snapshot(step, value=0.1):
    tensors = {part: {f"{part}.a": torch.full((SIZE,), value)} for part in PARTS[:3]}
    progress = {"step": step, "best": 0.1 + 0.2, "skipped": [3], "none": None}
    return Snapshot(step, {"names": ["a"]}, {**tensors, "strategy": {}}, progress)


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_checkpoint_reads_back_to_the_bit(store):
    for dtype in (torch.float64, torch.float32, torch.int64):
        saved = snapshot(5)
        saved.tensors["model"]["b"] = torch.arange(4).to(dtype)[1:]  # a view, not contiguous memory
        store.save(saved)
        found = store.newest().snapshot
        assert found.progress == saved.progress
        assert found.meta["names"] == ["a"]
        for part in PARTS:
            assert found.tensors[part].keys() == saved.tensors[part].keys()
            for name, tensor in saved.tensors[part].items():
                assert torch.equal(found.tensors[part][name], tensor)
                assert found.tensors[part][name].dtype == tensor.dtype


def test_the_newest_are_kept_and_last_points_at_one(store):
    for step in (1, 2, 10):
        store.save(snapshot(step))
    assert names(store) == ["last", "step-000002", "step-000010"]
    assert (store.folder / "last").read_text() == "step-000010\n"
    assert store.newest().snapshot.step == 10


def test_the_manifest_is_what_sha256sum_reads(store):
    path = store.save(snapshot(1))
    command = ["sha256sum", "-c", "MANIFEST"]
    said = subprocess.run(command, cwd=path, capture_output=True, text=True, check=True).stdout
    assert said.count("OK") == len(list(path.iterdir())) - 1


@pytest.mark.parametrize("file", [*FILES, "MANIFEST"])
def test_one_flipped_bit_is_noticed_and_the_older_one_used(store, file):
    store.save(snapshot(1))
    path = store.save(snapshot(2))
    flip_a_bit(path / file)
    found = store.newest()
    assert found.snapshot.step == 1
    (line,) = found.rejected
    assert "step-000002" in line


def test_a_missing_file_is_noticed(store):
    store.save(snapshot(1))
    (store.save(snapshot(2)) / "ema.safetensors").unlink()
    assert store.newest().snapshot.step == 1


def test_without_an_intact_one_it_says_so(store):
    assert store.newest() is None
    assert not store
    flip_a_bit(store.save(snapshot(1)) / "model.safetensors")
    assert store
    with pytest.raises(CheckpointError, match=r"no intact checkpoint.*model\.safetensors"):
        store.newest()


def test_the_same_step_can_be_saved_again(store):
    store.save(snapshot(1, 0.1))
    store.save(snapshot(1, 0.2))
    assert store.newest().snapshot.tensors["ema"]["ema.a"][0] == pytest.approx(0.2)
    assert names(store) == ["last", "step-000001"]


def test_steps_of_a_future_that_was_left_are_dropped(store):
    for step in (1, 5):
        store.save(snapshot(step))
    flip_a_bit(store.folder / "step-000005" / "progress.json")
    store.save(snapshot(2))
    assert names(store) == ["last", "step-000001", "step-000002"]


def test_going_on_keeps_later_ones_that_could_not_be_read_just_then(store):
    for step in (1, 5):
        store.save(snapshot(step))
    store.prune(1)  # as a run that goes on from the first does
    assert names(store) == ["last", "step-000001", "step-000005"]


def test_drafts_of_killed_runs_are_removed(store):
    store.save(snapshot(1))
    draft = store.folder / ".part-step-000007"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(b"half")
    store.save(snapshot(2))
    assert names(store) == ["last", "step-000001", "step-000002"]


FILE_SYNCS = len(FILES) + 1


@pytest.mark.parametrize("call", range(1, FILE_SYNCS + 5))
def test_a_full_disk_leaves_the_older_one(store, monkeypatch, call):
    """The disk fills up at any of the syncs of a save: files, folders, the pointer."""
    store.save(snapshot(1))
    calls = []

    def failing(handle):
        calls.append(handle)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(durable.os, "fsync", failing)
    with pytest.raises(StorageError, match=r"no space left.*resume=true") as caught:
        store.save(snapshot(2))
    assert caught.value.exit_code == 74
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert store.newest().snapshot.step in (1, 2)  # 2 once it is complete under its name
    assert read(store.folder / "step-000001").step == 1
    assert not list(store.folder.glob(".part-*"))
    store.save(snapshot(3))
    assert store.newest().snapshot.step == 3


def test_too_little_space_is_seen_before_writing(store, monkeypatch):
    store.save(snapshot(1))
    monkeypatch.setattr(durable.shutil, "disk_usage", lambda path: Free)
    with pytest.raises(StorageError, match=r"MB to write, 0\.0 free"):
        store.save(snapshot(2))
    assert names(store) == ["last", "step-000001"]


class Free:
    free = 1000


def test_another_schema_is_refused(store):
    path = store.save(snapshot(1))
    text = (path / "meta.json").read_text()
    assert json.loads(text)["schema"] == checkpoint.SCHEMA
    digest = write_file(path / "meta.json", text.replace('"schema": 1', '"schema": 99').encode())
    lines = (path / "MANIFEST").read_text().splitlines()
    assert lines[0].endswith("  meta.json")
    (path / "MANIFEST").write_text("\n".join([f"{digest}  meta.json", *lines[1:]]))
    with pytest.raises(CheckpointError, match="schema 99"):
        read(path)
