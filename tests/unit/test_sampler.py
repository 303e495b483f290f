"""The stream of samples: the same for any ranks, workers, cuts and starting step."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontrain.core.errors import DataError
from visiontrain.data.config import AugmentConfig, NoAugment
from visiontrain.data.dataset import EvalSet, TrainSet
from visiontrain.data.digits import Recipe, compose
from visiontrain.data.loader import eval_batches, train_steps
from visiontrain.data.sampler import Plan, step_keys, steps_per_epoch

SIDE = 64


@pytest.fixture(scope="module")
def table():
    return compose(Recipe(canvas=64, digits=(1, 3), heights=(16, 30)), "train", 10)


def samples(table, *, ranks=1, workers=0, accumulate=1, start=0, seed=3, batch=4):
    """Return {(step, id): hash of pixels and boxes} of all ranks, in whatever order they come."""
    data = TrainSet(table, SIDE, AugmentConfig(), seed=seed, epochs=2)
    found = {}
    for rank in range(ranks):
        plan = Plan(batch, 2, seed, accumulate, (rank, ranks), workers)
        for step in train_steps(data, plan, start):
            for b in step.micro_batches:
                for i in range(len(b)):
                    if b.valid[i]:
                        rows = b.targets[i][b.targets[i, :, 0] >= 0].numpy()
                        content = b.images[i].numpy().tobytes() + rows.tobytes()
                        key = (step.step, int(b.ids[i]))
                        assert key not in found
                        found[key] = hashlib.sha256(content).hexdigest()
    return found


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_ids_and_pixels_for_any_workers_and_ranks(table, workers, ranks):
    assert samples(table, workers=workers, ranks=ranks) == samples(table)


def test_the_same_for_any_number_of_micro_batches(table):
    assert samples(table, accumulate=3, ranks=2) == samples(table)


def test_another_seed_gives_other_pixels(table):
    assert not set(samples(table).values()) & set(samples(table, seed=4).values())


def test_epochs_differ_and_visit_every_image_once(table):
    found = samples(table)
    per_epoch = steps_per_epoch(len(table), 4)
    for epoch in range(2):
        ids = [row for step, row in found if step // per_epoch == epoch]
        assert sorted(ids) == list(range(len(table)))
    assert len(set(found.values())) == 2 * len(table)


@pytest.mark.parametrize("start", [1, 3, 5])
def test_starting_later_gives_the_rest_of_the_same_stream(table, start):
    rest = {key: value for key, value in samples(table).items() if key[0] >= start}
    assert samples(table, start=start, workers=2) == rest


@settings(max_examples=60)
@given(
    images=st.integers(1, 40),
    batch=st.integers(1, 12),
    accumulate=st.integers(1, 4),
    ranks=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_shares_cut_every_batch_evenly_and_lose_nothing(images, batch, accumulate, ranks, seed):
    plans = [Plan(batch, 2, seed, accumulate, (rank, ranks)) for rank in range(ranks)]
    for parts in zip(*(step_keys(images, plan, 0) for plan in plans), strict=True):
        sizes = [len(cell) for part in parts for cell in part.cells]
        keys = [key for part in parts for cell in part.cells for key in cell]
        assert len(keys) == len(set(keys)) == parts[0].images
        for cells in zip(*(part.cells for part in parts), strict=True):
            lengths = [len(cell) for cell in cells]
            assert max(lengths) - min(lengths) <= 1
        assert len(sizes) == ranks * accumulate


def test_skipped_steps_are_left_out_and_change_nothing_else():
    everything = list(step_keys(10, Plan(4, 2, 0), 0))
    some = list(step_keys(10, Plan(4, 2, 0, skipped=frozenset({1, 4})), 0))
    assert some == [keys for keys in everything if keys.step not in {1, 4}]


def test_a_rank_without_data_gets_an_image_that_does_not_count(table):
    data = TrainSet(table, SIDE, NoAugment(), seed=0, epochs=1)
    step = next(train_steps(data, Plan(1, 1, 0, 1, (1, 2)), 0))
    (batch,) = step.micro_batches
    assert (len(batch), float(batch.valid), int(batch.ids)) == (1, 0.0, -1)
    assert (batch.targets[..., 0] == -1).all()


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])  # five have more than there are batches
def test_evaluation_computes_every_image_in_the_same_batch_for_any_ranks(table, ranks):
    found = {}
    lengths = set()
    for rank in range(ranks):
        batches = list(eval_batches(EvalSet(table, SIDE), 4, (rank, ranks), 0))
        lengths.add(len(batches))
        for batch in batches:
            ids = tuple(batch.ids[batch.valid > 0].tolist())
            if ids:
                found[ids] = batch.images.numpy().tobytes()
    assert len(lengths) == 1  # sharded models must run in step
    assert sorted(found) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]


def test_an_unreadable_image_is_replaced_by_the_next_readable_one(table):
    class Holes:
        def __len__(self):
            return len(table)

        def name(self, row):
            return table.images.name(row)

        def read(self, row):
            if row in {2, 3}:
                raise DataError(f"{row}: broken")
            return table.images.read(row)

    broken = replace(table, images=Holes())
    data = TrainSet(broken, SIDE, NoAugment(), seed=0, epochs=1)
    assert [data[0, row].id for row in (1, 2, 3, 4)] == [1, 4, 4, 4]
