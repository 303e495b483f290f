"""Windows of shards: every row once, some shards at a time, and partners from the same ones."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontrain.core.seed import generator
from visiontrain.data.config import AugmentConfig, ClassifyAugment, DataConfig, ShardingConfig
from visiontrain.data.loader import train_steps
from visiontrain.data.open import open_dataset
from visiontrain.data.order import SHUFFLED, Balanced, Windowed, order_of
from visiontrain.data.sampler import Plan, step_keys
from visiontrain.data.samples import training_set
from visiontrain.data.sharding import shard
from visiontrain.data.windows import Windows

counts = st.lists(st.integers(1, 9), min_size=1, max_size=20)


def windows(lengths, shards):
    return Windows(np.cumsum([0, *lengths]), shards)


def shards_of(cut, rows):
    return np.searchsorted(cut.starts, rows, side="right") - 1


@settings(max_examples=60)
@given(lengths=counts, shards=st.integers(1, 6), seed=st.integers(0, 9), epoch=st.integers(0, 5))
def test_every_row_comes_once_and_shards_come_a_window_at_a_time(lengths, shards, seed, epoch):
    cut = windows(lengths, shards)
    total = sum(lengths)
    order = Windowed(SHUFFLED, cut)(total, seed, epoch)
    assert sorted(order) == list(range(total))
    assert np.array_equal(order, Windowed(SHUFFLED, cut)(total, seed, epoch))
    place = {int(s): k for k, s in enumerate(dict.fromkeys(shards_of(cut, order).tolist()))}
    read = [set(cut.around(int(row), seed, epoch).tolist()) for row in order]
    assert max(map(len, read)) <= shards
    changes = [k for k in range(1, len(read)) if read[k] != read[k - 1]]
    assert len(changes) == -(-len(lengths) // shards) - 1  # no window is returned to
    assert len(place) == len(lengths)


@settings(max_examples=60)
@given(lengths=counts, shards=st.integers(1, 6), row=st.integers(0, 179), draws=st.integers(1, 8))
def test_partners_are_from_the_window_that_a_row_is_read_in(lengths, shards, row, draws):
    cut = windows(lengths, shards)
    row %= sum(lengths)
    at, many = (3, 1), np.full(draws, row)
    found = cut.near(many, at, generator(row).random(draws))
    assert set(shards_of(cut, found)) <= set(cut.around(row, *at))
    near = cut.near(np.array([row, 0]), at, np.array([0.0, 1 - 2**-53]))
    assert set(shards_of(cut, near[:1])) <= set(cut.around(row, *at))
    assert set(shards_of(cut, near[1:])) <= set(cut.around(0, *at))
    wanted = np.arange(1.0, sum(lengths) + 1) % 3  # a third of the rows never
    weighed = cut.near(many, at, generator(row).random(draws), np.cumsum(wanted))
    assert set(shards_of(cut, weighed)) <= set(cut.around(row, *at))
    alike = cut.near(many, at, generator(row).random(draws), np.arange(1.0, sum(lengths) + 1))
    assert np.array_equal(alike, found)


@settings(max_examples=60)
@given(
    lengths=counts,
    shards=st.integers(1, 6),
    batch=st.integers(1, 12),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 5),
    start=st.integers(0, 30),
)
def test_ranks_and_micro_batches_share_every_row_once_and_resume_gives_the_rest(
    lengths, shards, batch, accumulate, ranks, start
):
    cut, total = windows(lengths, shards), sum(lengths)
    plans = [Plan(batch, 2, 5, accumulate, (rank, ranks)) for rank in range(ranks)]
    order = Windowed(SHUFFLED, cut)
    steps = [list(step_keys(total, plan, 0, order)) for plan in plans]
    for epoch in range(2):
        keys = [
            key
            for own in steps
            for s in own
            if s.epoch == epoch
            for cell in s.cells
            for key in cell
        ]
        assert sorted(keys) == [(epoch, row) for row in range(total)]
    for plan, own in zip(plans, steps, strict=True):
        assert list(step_keys(total, plan, start, order)) == [s for s in own if s.step >= start]


def test_rows_are_mixed_over_the_whole_window():
    """Neighbours in the order come from other shards as often as chance has it."""
    cut = windows([50] * 32, 8)
    ordered = Windowed(SHUFFLED, cut)
    order = shards_of(cut, ordered(1600, 0, 0))
    assert 0.8 < np.mean(order[1:] != order[:-1]) < 0.95  # 7/8 by chance
    assert not np.array_equal(ordered(1600, 0, 0), ordered(1600, 0, 1))


def samples(table, augment, workers=0, ranks=1, start=0):
    """Return {(step, id): hash of the picture and its labels}, of all ranks."""
    order, found = order_of(DataConfig(), table), {}
    data = training_set(table, 64, augment, seed=3, epochs=1, order=order)
    for rank in range(ranks):
        for step in train_steps(data, Plan(6, 1, 3, 1, (rank, ranks), workers), start):
            for batch in step.micro_batches:
                for k, row in enumerate(batch.ids.tolist()):
                    rows = batch.targets[k][batch.targets[k, :, 0] >= 0]
                    content = batch.images[k].numpy().tobytes() + rows.numpy().tobytes()
                    found[step.step, row] = hashlib.sha256(content).hexdigest()
    return {key: value for key, value in found.items() if key[1] >= 0}


@pytest.mark.parametrize(
    ("task", "augment"),
    [
        ("detect", AugmentConfig(mixup=0.5, copy_paste=0.5, close_mosaic=0)),
        ("classify", ClassifyAugment(mixup=0.5, cutmix=0.5)),
    ],
)
def test_samples_of_shards_are_the_same_for_any_loaders_and_ranks(task, augment, tmp_path):
    source = DataConfig(source="digits", train_images=20, val_images=1)
    out = str(tmp_path / "tars")
    shard(ShardingConfig(data=source, task=task, out=out, shard_size=0.02, split=["train"]))
    opened = open_dataset(DataConfig(source=out, window=2, train_images=20), task)
    table = opened.table("train")
    assert len(table.windows.starts) > 4
    whole = samples(table, augment)
    assert len(whole) == 20
    assert samples(table, augment, workers=2, ranks=2) == whole
    rest = {key: value for key, value in whole.items() if key[0] >= 2}
    assert samples(table, augment, workers=1, start=2) == rest
    read = []
    spied = replace(table, images=Spy(table.images, read))
    order = order_of(DataConfig(), spied)
    training_set(spied, 64, augment, seed=3, epochs=1, order=order).cell([(0, 7)], 0)
    window = table.windows.around(7, 3, 0)
    assert set(shards_of(table.windows, read).tolist()) <= set(window.tolist())


class Spy:
    """An ImageSource that notes which rows are read."""

    def __init__(self, source, rows):
        self.source, self.rows = source, rows

    def __len__(self):
        return len(self.source)

    def read(self, row):
        self.rows.append(row)
        return self.source.read(row)


def test_balanced_entries_of_shards_come_a_window_at_a_time():
    """Which entries there are stays the balance's matter, when they come the windows'."""
    cut = windows([10] * 6, 2)
    inner = Balanced(np.linspace(0, 2, 60), np.cumsum(np.linspace(0, 2, 60)), np.zeros(60, int))
    entries = Windowed(inner, cut)(60, 3, 1)
    assert sorted(entries) == sorted(inner(60, 3, 1))
    numbers = cut.numbers(entries % 60, 3, 1)
    assert numbers.tolist() == sorted(numbers.tolist())
    assert set(numbers.tolist()) == {0, 1, 2}


def test_partners_in_a_window_come_as_often_as_the_balance_wants_them():
    """A single window is the whole set: what it chooses is what the other order chooses."""
    expected = np.where(np.arange(60) % 10 == 0, 5.5, 0.5)
    inner = Balanced(expected, np.cumsum(expected), np.zeros(60, int))
    at, draws, entries = (0, 0), (np.arange(600) + 0.5) / 600, np.zeros(600, np.int64)
    whole = Windowed(inner, windows([10] * 6, 6)).chosen(draws, entries, 60, at)
    assert np.mean(whole % 10 == 0) == np.mean(inner.chosen(draws, entries, 60, at) % 10 == 0)
    part = Windowed(inner, windows([10] * 6, 2)).chosen(draws, entries, 60, at)
    assert 0.5 < np.mean(part % 10 == 0) < 0.6  # 11 of 20
