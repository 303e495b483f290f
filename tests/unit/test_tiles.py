"""Tiles: they cover images, and what they see comes out whole and once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import memory_table

from visiontrain.data.tiles import TiledEval, tiled
from visiontrain.ops.tiles import Tiling, merge_rows

LENGTH = st.integers(1, 400)


@given(LENGTH, LENGTH, st.integers(32, 128), st.floats(0, 0.9))
def test_tiles_cover_an_image_and_overlap_as_asked(width, height, side, share):
    tiling = Tiling.of(side, share)
    rects = tiling.rects(width, height)
    seen = np.zeros((height, width), np.bool_)
    for x1, y1, x2, y2 in rects.tolist():
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert x2 - x1 == min(side, width) and y2 - y1 == min(side, height)
        seen[y1:y2, x1:x2] = True
    assert seen.all()
    for starts in (np.unique(rects[:, 0]), np.unique(rects[:, 1])):
        assert (np.diff(starts) <= side - tiling.overlap).all()


@st.composite
def scenes(draw):
    """Draw a tiling, an image and boxes lower and narrower than a tile and than the image.

    Two boxes that both reach from border to border of the common ground look the same there.
    """
    side = draw(st.integers(32, 96))
    size = draw(st.integers(20, 300)), draw(st.integers(20, 300))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    count = draw(st.integers(0, 12))
    extent = random.uniform(3, 0.9 * np.minimum(side, size), (count, 2))
    low = random.uniform(0, 1, (count, 2)) * np.maximum(np.array(size) - extent, 0)
    boxes = np.hstack([low, np.minimum(low + extent, size)])
    classes = random.integers(0, 2, count)
    return Tiling.of(side, draw(st.floats(0.1, 0.6))), size, boxes, classes


def seen_by(rects, boxes, classes):
    """List what a perfect detector finds in tiles: (tile, box in its pixels, score, class)."""
    rows = [
        (t, *(part - np.tile(rect[:2], 2)), 0.5 + k / 100, label)
        for t, rect in enumerate(rects)
        for k, (box, label) in enumerate(zip(boxes, classes, strict=True))
        if (part := np.clip(box, np.tile(rect[:2], 2), np.tile(rect[2:], 2)))[2] > part[0]
        and part[3] > part[1]
    ]
    return np.array(rows, np.float64).reshape(-1, 7)


@settings(max_examples=300)
@given(scenes())
def test_what_tiles_see_exactly_comes_out_exactly_and_once(scene):
    tiling, size, boxes, classes = scene
    rects = tiling.rects(*size).astype(np.float64)
    found = merge_rows(seen_by(rects, boxes, classes), np.zeros(len(rects), np.int64), rects)
    assert len(found) == len(boxes)
    found = found[np.argsort(found[:, 5])]  # scores tell the boxes apart
    assert np.allclose(found[:, 1:5], boxes, atol=1e-9)
    assert found[:, 6].tolist() == classes.tolist()


def test_the_likeliest_whole_box_is_taken_and_neighbours_stay_apart():
    rects = np.array([[0, 0, 100, 100], [60, 0, 160, 100]], np.float64)
    rows = np.array(
        [
            [0, 62, 12, 82, 30, 0.9, 1],  # whole in both tiles, as likely in the other
            [1, 3, 11, 23, 31, 0.9, 1],
            [0, 85, 50, 100, 80, 0.8, 1],  # cut by the first tile's border
            [1, 25, 50, 75, 80, 0.7, 1],
            [0, 62, 10, 82, 30, 0.5, 0],  # of another class
        ],
        np.float64,
    )
    found = merge_rows(rows, np.zeros(2, np.int64), rects)
    assert merge_rows(rows[::-1], np.zeros(2, np.int64), rects).tolist() == found.tolist()
    assert len(merge_rows(rows, np.zeros(2, np.int64), rects, 2)) == 2
    assert found.tolist() == [
        [0, 62, 12, 82, 30, 0.9, 1],
        [0, 85, 50, 135, 80, 0.8, 1],
        [0, 62, 10, 82, 30, 0.5, 0],
    ]


def test_a_faint_detection_takes_no_partner_away():
    rects = np.array([[0, 0, 640, 640], [512, 0, 1152, 640]], np.float64)
    rows = np.array(
        [
            [0, 530, 100, 620, 200, 0.9, 0],
            [1, 20, 101, 110, 201, 0.85, 0],  # the same object
            [1, 17, 100, 109, 199, 0.004, 0],  # nearer to the first, but hardly there
        ],
        np.float64,
    )
    found = merge_rows(rows, np.zeros(2, np.int64), rects)
    assert found[:, 5].tolist() == [0.9, 0.004]


def test_a_table_of_tiles_has_the_boxes_that_are_seen():
    picture = np.random.default_rng(0).integers(0, 256, (40, 100, 3), np.uint8)
    boxes = [np.array([[1, 10, 10, 30, 30], [2, 34, 0, 54, 20], [0, 50, 5, 51, 9]], np.float32)]
    table = memory_table([picture], boxes)
    cut = tiled(table, Tiling(40, 10))
    assert cut.rects.tolist() == [[0, 0, 40, 40], [30, 0, 70, 40], [60, 0, 100, 40]]
    assert np.array_equal(cut.table.images.read(1), picture[:, 30:70])
    seen = [cut.table.targets(row)[:, :5].tolist() for row in range(3)]
    assert seen == [
        [[1, 10, 10, 30, 30], [2, 34, 0, 40, 20]],  # 6 of 20 columns: 30 %
        [[2, 4, 0, 24, 20], [0, 20, 5, 21, 9]],
        [],
    ]
    assert cut.table.area[1] == pytest.approx(0.3 * table.area[1])


@pytest.mark.parametrize("box", [[10, 10, 350, 150], [5, 70, 355, 76]])  # high, and thin
def test_objects_larger_than_tiles_are_trained_on_by_their_parts_and_put_together(box):
    image = np.zeros((160, 360, 3), np.uint8)
    table = memory_table([image], [np.array([[0, *box]], np.float32)])
    cut = tiled(table, Tiling(72, 8))
    parts = [
        [row, *part, 0.5 + row / 100, label]
        for row in range(len(cut.owner))
        for label, *part in cut.table.targets(row)[:, :5].tolist()
    ]
    assert len(parts) > 4
    found = merge_rows(np.array(parts), cut.owner, cut.rects.astype(np.float64))
    assert found[:, 1:5].tolist() == [box]


def test_scores_of_tiles_are_those_of_whole_images():
    pictures = [np.zeros((64, 150, 3), np.uint8), np.zeros((30, 20, 3), np.uint8)]
    boxes = [np.array([[0, 20, 5, 60, 50]], np.float32), np.zeros((0, 5), np.float32)]
    data = TiledEval(memory_table(pictures, boxes), 64, Tiling(64, 16), 300)
    batch = data.cell(range(len(data)))
    assert (len(data), len(data.table), batch.ids.tolist()) == (4, 2, [0, 1, 2, 3])
    import torch  # noqa: PLC0415

    rows = seen_by(data.tiles.rects[:3].astype(float), boxes[0][:, 1:], [0])
    assert data.merge(torch.from_numpy(rows)).tolist() == [[0, 20, 5, 60, 50, 0.5, 0]]


def test_boxes_are_cut_near_a_border_too_and_neighbours_are_two_objects():
    rects = np.array([[0, 0, 100, 100], [60, 0, 160, 100]], np.float64)
    near = [[0, 85, 50, 98.5, 80, 0.9, 0], [1, 25, 50, 75, 80, 0.6, 0]]  # the second is whole
    found = merge_rows(np.array(near), np.zeros(2, np.int64), rects)
    assert found.tolist() == [[0, 85, 50, 135, 80, 0.9, 0]]
    apart = [[0, 62, 10, 80, 30, 0.9, 0], [1, 12, 10, 30, 30, 0.8, 0]]  # they share 8 of 28
    assert len(merge_rows(np.array(apart), np.zeros(2, np.int64), rects)) == 2
