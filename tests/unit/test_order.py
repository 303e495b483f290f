"""How often an epoch shows an image: exact, even, and the same however it is cut."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryImages

from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError
from visiontrain.data.build import whole_images
from visiontrain.data.config import AugmentConfig, ClassifyAugment, DataConfig
from visiontrain.data.dataset import TrainSet
from visiontrain.data.digits import Recipe, compose
from visiontrain.data.open import open_dataset
from visiontrain.data.order import clause, order_of
from visiontrain.data.sampler import Plan, step_keys
from visiontrain.data.samples import training_set
from visiontrain.recipe import Run
from visiontrain.run_checks import check_values

KINDS = st.sampled_from(("repeat", "class"))
CLASSES = 5


def table_of(labels):
    """Return a table of pictures of noise, each with a set of classes."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (32, 32, 3), np.uint8) for _ in labels]
    sizes = np.full((len(labels), 2), 32, np.int32)
    flat = np.array([label for own in labels for label in sorted(own)], np.int64)
    counts = np.array([len(own) for own in labels], np.int64)
    names = tuple("abcde"[:CLASSES])
    return whole_images(names, MemoryImages(pictures), sizes, flat, counts, several=True)


def order(labels, kind, threshold="auto"):
    return order_of(DataConfig(balance=kind, balance_threshold=threshold), table_of(labels))


LABELS = st.lists(st.sets(st.integers(0, CLASSES - 1), max_size=3), min_size=1, max_size=40)


@settings(max_examples=80)
@given(labels=LABELS, kind=KINDS, seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_counts_are_the_whole_numbers_around_what_is_expected(labels, kind, seed, epoch):
    made, images = order(labels, kind), len(labels)
    entries = made(images, seed, epoch)
    assert len(set(entries.tolist())) == images  # as long as ever, no sample twice
    counts = np.bincount(entries % images, minlength=images)
    assert (np.abs(counts - made.expected) < 1).all()
    again = entries // images
    assert all(
        sorted(again[entries % images == row]) == list(range(n)) for row, n in enumerate(counts)
    )
    assert np.array_equal(entries, made(images, seed, epoch))


@settings(max_examples=40)
@given(
    labels=LABELS,
    kind=KINDS,
    batch=st.integers(1, 12),
    accumulate=st.integers(1, 3),
    ranks=st.integers(1, 4),
    start=st.integers(0, 3),
)
def test_every_cut_and_every_later_start_gives_the_same_stream(
    labels, kind, batch, accumulate, ranks, start
):
    made, images = order(labels, kind), len(labels)
    whole = {k.step: k.cells[0] for k in step_keys(images, Plan(batch, 3, 1), 0, made)}
    plans = [Plan(batch, 3, 1, accumulate, (rank, ranks)) for rank in range(ranks)]
    parts = zip(*(step_keys(images, plan, start, made) for plan in plans), strict=True)
    found = {
        part[0].step: tuple(
            key for cells in zip(*(p.cells for p in part), strict=True) for c in cells for key in c
        )
        for part in parts
    }
    assert found == {step: keys for step, keys in whole.items() if step >= start}


@pytest.mark.parametrize("counts", [(20, 2, 2), (3, 30, 3, 4), (1, 59)])
def test_classes_come_equally_often_in_every_epoch(counts):
    labels = [{label} for label, count in enumerate(counts) for _ in range(count)]
    made, images = order(labels, "class"), len(labels)
    own = np.array([label for (label,) in labels])
    seen = set()
    for epoch in range(30):
        rows = made(images, 0, epoch) % images
        assert (np.bincount(own[rows]) == images // len(counts)).all()
        seen |= set(rows.tolist())
    assert seen == set(range(images))  # no image is left out for ever


def test_an_unbalanced_part_of_the_digits_comes_out_balanced():
    whole = open_dataset(DataConfig(source="digits"), "classify").table("train")
    own = [np.flatnonzero(whole.classes == digit) for digit in range(10)]
    rows = np.concatenate([o[: 90 if digit < 5 else 10] for digit, o in enumerate(own)])
    classes = whole.classes[rows]
    table = whole_images(whole.names, None, whole.sizes[rows], classes, np.ones(500, np.int64))
    made = order_of(DataConfig(balance="class"), table)
    for epoch in range(3):
        assert np.bincount(classes[made(500, 7, epoch) % 500]).tolist() == [50] * 10


def test_over_epochs_every_image_comes_as_often_as_expected():
    labels = [{0}] * 30 + [{1}] * 7 + [{0, 2}] * 2 + [set()] * 4
    made, images = order(labels, "class"), 43
    entries = np.concatenate([made(images, 0, epoch) % images for epoch in range(2000)])
    mean = np.bincount(entries, minlength=images) / 2000
    assert np.abs(mean - made.expected).max() < 0.05
    assert made.expected[-4:] == pytest.approx(1)  # without labels: as before
    chosen = made.chosen(
        (np.arange(10000) + 0.5) / 10000, np.zeros(10000, np.int64), images, (0, 0)
    )
    assert np.abs(np.bincount(chosen, minlength=images) * images / 1e4 - made.expected).max() < 0.01


def test_repeat_factors_are_those_of_the_paper():
    labels = [{0}] * 96 + [{0, 1}] * 3 + [{2}]
    made = order(labels, "repeat", 0.12)
    factors = np.array([1.0] * 96 + [2.0] * 3 + [12**0.5])
    assert made.expected == pytest.approx(factors * 100 / factors.sum())
    assert "changes nothing" in clause(DataConfig(balance="repeat"), order([{0}, {1}], "repeat"))


def test_crowds_do_not_count():
    table = table_of([{0}, {0}, {0, 1}])
    crowd = table.classes == 1
    made = order_of(DataConfig(balance="class"), replace(table, crowd=crowd))
    assert made.expected == pytest.approx(1)


def test_a_repeated_image_looks_different_each_time():
    digits = compose(Recipe(canvas=64, digits=(1, 3), heights=(16, 30)), "train", 4)
    noise = table_of([{0}, {1}, {1}, {1}])
    for table, side, augment in (
        (digits, 64, AugmentConfig()),
        (noise, 32, ClassifyAugment(crop=1.0, translate=0.2)),
        (noise, 32, ClassifyAugment(crop=0.3)),
    ):
        made = order_of(DataConfig(balance="class"), table)
        data = training_set(table, side, augment, seed=0, epochs=20, order=made)
        batch = data.cell([(0, 1 + k * 4) for k in range(4)], 0)
        assert batch.ids.tolist() == [1] * 4  # a row of the table, for scores and traces
        assert len({image.numpy().tobytes() for image in batch.images}) == 4


def test_partners_of_mosaics_are_balanced_too():
    """Else three of four images in a mosaic would be as unbalanced as ever."""
    table = compose(Recipe(canvas=64, digits=(1, 1), heights=(16, 30)), "train", 40)
    rare = replace(table, names=("a", "b"), classes=(np.arange(40) >= 38).astype(np.int32))
    seen = []
    for kind in ("none", "class"):
        made = order_of(DataConfig(balance=kind), rare)
        data = TrainSet(rare, 64, AugmentConfig(), seed=0, epochs=40, order=made)
        samples = [data[0, int(entry)] for entry in made(40, 0, 0)]
        seen.append(np.concatenate([sample.targets[:, 0] for sample in samples]).mean())
    assert seen[0] < 0.2
    assert 0.35 < seen[1] < 0.65


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"balance_threshold": 0.1}, "data.balance_threshold: 0.1; it changes nothing here, take"),
        ({"balance": "class", "single_cls": True}, "take data.single_cls=false"),
    ],
)
def test_what_changes_nothing_is_refused(keys, told):
    with pytest.raises(ConfigError, match=told):
        check_values(build(Run, {"data": keys}))
