"""How images are dealt out to clients: each once, by the rules, and the same every time."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryImages

from visiontrain.core.errors import ConfigError
from visiontrain.data.build import whole_images
from visiontrain.data.partition import Camera, Dealing, deal, main_class, part

CLASSES = 5
KINDS = ("iid", "dirichlet", "classes", "quantity", "feature")


def table_of(labels, names=None):
    """Return a table of small pictures, a class each; `names` are their files'."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (8, 8, 3), np.uint8) for _ in labels]
    images = MemoryImages(pictures, names=names)
    sizes, counts = np.full((len(labels), 2), 8, np.int32), np.ones(len(labels), np.int64)
    classes = np.array(labels, np.int64)
    return whole_images(tuple("abcde"[:CLASSES]), images, sizes, classes, counts, several=False)


def labels(count, seed=0):
    return np.random.default_rng(seed).integers(0, CLASSES, count)


def shares_of(table, dealt):
    """Return how many of each class each client has (K, C)."""
    found = main_class(table)
    return np.array([np.bincount(found[rows], minlength=CLASSES) for rows in dealt])


@settings(max_examples=40)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 6),
    st.floats(0.3, 10),
    st.integers(60, 200),
    st.integers(0, 40),
    st.integers(0, 99),
)
def test_every_image_goes_to_one_client(kind, clients, alpha, count, others, seed):
    dealing = Dealing(kind, clients, alpha, 2, seed)
    tables = table_of(labels(count, seed)), table_of(labels(others, seed + 1))
    dealt = deal(dealing, *tables)
    for table, own in zip(tables, dealt, strict=True):
        assert len(own) == clients
        assert sorted(np.concatenate(own).tolist()) == list(range(len(table)))
        assert all((np.diff(rows) > 0).all() for rows in own)
    again = deal(dealing, *tables)
    for own, same in zip(dealt[0] + dealt[1], again[0] + again[1], strict=True):
        np.testing.assert_array_equal(own, same)


def test_iid_parts_are_as_large_and_as_mixed():
    table = table_of(labels(1000))
    dealt, _ = deal(Dealing("iid", 4), table, table)
    assert {len(rows) for rows in dealt} == {250}
    assert (shares_of(table, dealt) > 30).all()


def test_a_low_alpha_is_more_unequal_and_nobody_is_left_without():
    table = table_of(labels(1000))
    spread = {}
    for alpha in (0.1, 1.0, 100.0):
        dealt, _ = deal(Dealing("dirichlet", 5, alpha), table, table)
        shares = shares_of(table, dealt)
        assert shares.sum(axis=1).min() >= 10
        spread[alpha] = (shares / shares.sum(axis=0)).std()
    assert spread[0.1] > 1.5 * spread[1.0] > 3 * spread[100.0]


def test_another_split_has_the_same_shares_of_classes():
    train, val = table_of(labels(2000)), table_of(labels(1000, 1))
    for kind in ("dirichlet", "classes"):
        first, second = (
            shares_of(table, rows) / shares_of(table, rows).sum(axis=0)
            for table, rows in zip(
                (train, val), deal(Dealing(kind, 5, 0.3), train, val), strict=True
            )
        )
        np.testing.assert_allclose(first, second, atol=0.02)


@pytest.mark.parametrize("own", [1, 2, 3])
def test_each_client_has_so_many_classes_and_each_class_is_cut_evenly(own):
    table = table_of(labels(1000))
    dealt, _ = deal(Dealing("classes", 10, classes=own), table, table)
    shares = shares_of(table, dealt)
    assert ((shares > 0).sum(axis=1) == own).all()
    assert (shares[np.arange(10), np.arange(10) % CLASSES] > 0).all()
    for column in shares.T:
        assert np.ptp(column[column > 0]) <= 1


def test_folders_stay_whole_and_a_split_follows_by_name():
    names = [f"train/{folder}/{n}.png" for folder in "abcd" for n in range(5 + ord(folder) % 3)]
    others = [f"val/{folder}/{n}.png" for folder in "abcdx" for n in range(2)]
    tables = table_of(labels(len(names)), names), table_of(labels(len(others)), others)
    dealt = deal(Dealing("source", 2), *tables)
    folders = [
        [{own.images.name(int(row)).split("/")[1] for row in rows} for rows in parts]
        for own, parts in zip(tables, dealt, strict=True)
    ]
    assert not folders[0][0] & folders[0][1]
    assert folders[0][0] | folders[0][1] == set("abcd")
    for train, val in zip(*folders, strict=True):
        assert val - {"x"} == train


def test_more_clients_than_folders_is_an_error():
    table = table_of(labels(6), [f"only/{n}.png" for n in range(6)])
    with pytest.raises(ConfigError, match=re.escape("images lie in 1 folders")):
        deal(Dealing("source", 2), table, table)


def test_cameras_differ_and_show_the_same_picture_twice_alike():
    table = table_of(labels(40))
    dealing = Dealing("feature", 2)
    dealt, _ = deal(dealing, table, table)
    first = part(table, dealt[0], dealing, 0)
    raw = table.images.read(int(dealt[0][3]))
    seen = first.images.read(3)
    np.testing.assert_array_equal(seen, first.images.read(3))
    assert seen.shape == raw.shape
    assert np.abs(seen.astype(int) - raw).mean() > 5
    cameras = [Camera.of(table.images, k, 0) for k in range(6)]
    assert len({(camera.gains, camera.blur) for camera in cameras}) == 6


def test_a_part_has_its_own_labels():
    table = table_of(labels(50))
    rows = np.array([3, 4, 17, 49])
    own = part(table, rows, Dealing("iid", 3), 0)
    np.testing.assert_array_equal(main_class(own), main_class(table)[rows])
    np.testing.assert_array_equal(own.images.read(2), table.images.read(17))
