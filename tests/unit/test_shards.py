"""Checkpoints that every process writes a part of."""

import errno
import os
import subprocess
import time
from pathlib import Path
from threading import Event, Thread

import pytest
import torch
from test_checkpoint import flip_a_bit, names, snapshot

from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.core.types import Piece
from visiontrain.engine import shards
from visiontrain.engine.checkpoint import CheckpointStore, Snapshot, read
from visiontrain.engine.shards import Shard, file_of, write_shard

WORLD = 3
CUT = {  # of the last process's part of "few" there are no rows, of its "many" fewer
    "many": torch.arange(21.0).view(7, 3),
    "few": torch.arange(4).view(2, 2),
}
WHOLE = {"number": torch.tensor(0.1), "count": torch.tensor([5])}


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def pieces(rank):
    """Cut tensors as FSDP does; what is not cut is the first process's."""
    found = {}
    for name, tensor in CUT.items():
        each = -(-len(tensor) // WORLD)
        start = min(len(tensor), each * rank)
        rows = tensor[start : start + each]
        if len(rows):
            found[name] = Piece(rows, start, tuple(tensor.shape))
    whole = {n: Piece(t, 0, tuple(t.shape)) for n, t in WHOLE.items()}
    return {"model": found, "ema": found, "strategy": whole if rank == 0 else {}}


def save(store, step, change=lambda shard: shard):
    """Save as three processes do; return the folder."""
    draft = store.begin(step, 1000)
    for rank in reversed(range(WORLD)):
        write_shard(draft, change(Shard(rank, WORLD, pieces(rank))))
    return store.complete(draft, empty(step), WORLD, Event())


def empty(step):
    return Snapshot(step, {"names": ["a"]}, {}, {"step": step})


FILES = ["MANIFEST", "meta.json", "progress.json", *(file_of(rank, WORLD) for rank in range(WORLD))]


def test_parts_read_back_as_one(store):
    path = save(store, 5)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    found = store.newest().snapshot
    assert (found.step, found.progress) == (5, {"step": 5})
    assert found.tensors["optimizer"] == {}
    for part, want in {"model": CUT, "ema": CUT, "strategy": WHOLE}.items():
        assert found.tensors[part].keys() == want.keys()
        assert all(torch.equal(found.tensors[part][name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 7), (0, 3), (2, 4), (3, 6), (6, 7), (7, 7), (1, 7)]
)
def test_rows_come_from_the_files_that_have_them(store, start, stop):
    found = read(save(store, 5)).tensors["model"]
    assert torch.equal(found.rows("many", start, stop), CUT["many"][start:stop])


def test_the_manifest_is_what_sha256sum_reads(store):
    command = ["sha256sum", "-c", "MANIFEST"]
    said = subprocess.run(command, cwd=save(store, 1), capture_output=True, text=True, check=True)
    assert said.stdout.count("OK") == len(FILES) - 1


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit_is_noticed_and_the_older_one_used(store, file):
    store.save(snapshot(1))  # of one process: both kinds lie side by side
    flip_a_bit(save(store, 2) / file)
    found = store.newest()
    assert found.snapshot.step == 1
    assert "step-000002" in found.rejected[0]


@pytest.mark.parametrize("file", FILES)
def test_without_one_of_its_files_it_is_absent(store, file):
    save(store, 1)
    (save(store, 2) / file).unlink()
    assert store.newest().snapshot.step == 1


def without(part, name, rank):
    """Return what forgets a piece."""

    def change(shard):
        if shard.rank != rank:
            return shard
        kept = {n: p for n, p in shard.pieces[part].items() if n != name}
        return Shard(shard.rank, shard.world, {**shard.pieces, part: kept})

    return change


@pytest.mark.parametrize("rank", range(WORLD))
def test_rows_that_nobody_wrote_are_noticed(store, rank):
    path = save(store, 2, change=without("ema", "many", rank))
    with pytest.raises(CheckpointError, match="rows of ema/many are missing"):
        read(path)


def test_nothing_is_visible_before_all_parts_are_there(store, monkeypatch):
    monkeypatch.setattr(shards, "LOOK_S", 0.01)
    draft = store.begin(3, 1000)
    thread = Thread(target=store.complete, args=(draft, empty(3), WORLD, Event()))
    thread.start()
    for rank in (2, 0, 1):
        assert store.newest() is None
        write_shard(draft, Shard(rank, WORLD, pieces(rank)))
    thread.join(10)
    assert store.newest().snapshot.step == 3
    assert names(store) == ["last", "step-000003"]


def test_a_process_that_cannot_write_tells_the_main_one(store, monkeypatch):
    save(store, 1)
    draft = store.begin(2, 1000)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", full)
        with pytest.raises(StorageError, match="no space left"):
            write_shard(draft, Shard(1, WORLD, pieces(1)))
    for rank in (0, 2):
        write_shard(draft, Shard(rank, WORLD, pieces(rank)))
    with pytest.raises(StorageError, match="no space left"):
        store.complete(draft, empty(2), WORLD, Event())
    assert names(store) == ["last", "step-000001"]


def full(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("told", [True, False])
def test_a_process_that_does_not_come_is_not_waited_for_forever(store, monkeypatch, told):
    save(store, 1)
    give_up = Event()
    if told:
        give_up.set()
    else:
        monkeypatch.setattr(shards, "PATIENCE_S", 0.0)
    draft = store.begin(2, 1000)
    for rank in (0, 1):
        write_shard(draft, Shard(rank, WORLD, pieces(rank)))
    with pytest.raises(StorageError, match=r"shard-00003-of-00003\.safetensors was not written"):
        store.complete(draft, empty(2), WORLD, give_up)
    assert names(store) == ["last", "step-000001"]
    assert store.newest().snapshot.step == 1


@pytest.mark.parametrize("room", [True, False])
def test_a_full_disk_is_known_at_once_also_without_room_for_a_word(tmp_path, monkeypatch, room):
    """What was written of the shard is given back, so that the others need not wait."""
    shard = Shard(0, 1, pieces(0))

    def fill(path, rows, metadata):
        path.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "write_tensors", fill)
    if not room:
        monkeypatch.setattr(Path, "write_text", lambda path, text, **_: path.touch())
    with pytest.raises(StorageError, match=r"(?i)no space"):
        write_shard(tmp_path, shard)
    assert not (tmp_path / shard.file).exists()
    began = time.monotonic()
    with pytest.raises(
        StorageError, match=r"(?i)no space" if room else "could not be written; make"
    ):
        shards.wait_for_shards(tmp_path, 1, Event())
    assert time.monotonic() - began < 5
