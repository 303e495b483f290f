"""Augmentation: boxes go where their pixels go, draws are independent and repeatable."""

import numpy as np
import pytest

from visiontrain.core.seed import generator
from visiontrain.data.augment import Augment
from visiontrain.data.config import AugmentConfig
from visiontrain.data.letterbox import boxed, letterbox
from visiontrain.data.mosaic import Placement, blank, cut, place, tiles

COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def painted(width, height, index, random):
    """Return a black image with one rectangle of its own colour, and its target row."""
    x1, y1 = random.integers(0, width // 2), random.integers(0, height // 2)
    x2, y2 = random.integers(x1 + 12, width), random.integers(y1 + 12, height)
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = COLOURS[index]
    return image, np.array([[index, x1, y1, x2, y2, 1]], np.float32)


def extent(canvas, index):
    """Return the box of the pixels that are mostly of colour `index`."""
    near = np.abs(canvas.astype(int) - COLOURS[index]).max(-1) < 128
    ys, xs = near.nonzero()
    return None if not len(xs) else (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.mark.parametrize("seed", range(12))
def test_mosaic_boxes_lie_where_their_pixels_are(seed):
    random, side = generator("test", seed), 96
    sizes = [tuple(random.integers(40, 140, 2).tolist()) for _ in range(4)]
    parts = [painted(w, h, i, random) for i, (w, h) in enumerate(sizes)]
    centre = tuple(random.uniform(24, 72, 2).tolist())
    canvas = blank(side)
    where = tiles(sizes, side, float(random.uniform(0.5, 1.5)), centre)
    found = [
        place(image, rows, spot, canvas) for (image, rows), spot in zip(parts, where, strict=True)
    ]
    for index, rows in enumerate(found):
        seen = extent(canvas, index)
        for row in rows:
            assert seen is not None
            assert np.abs(np.array(seen) - row[1:5]).max() <= 1.0


def test_zoom_keeps_pixel_centres():
    """Doubling an image must not shift it by half a pixel."""
    image, rows = painted(32, 32, 0, generator("zoom"))
    canvas = blank(64)
    (row,) = place(image, rows, Placement(2.0, 0.0, 0.0, (0, 0, 64, 64)), canvas)
    assert extent(canvas, 0) == tuple(row[1:5].astype(int))


def test_boxes_of_which_little_remains_are_dropped():
    rows = np.array(
        [[0, -50, 0, 3, 20, 1], [1, 0, 0, 20, 20, 1], [2, 30, 0, 31, 30, 1]], np.float32
    )
    assert cut(rows, (0, 0, 64, 64))[:, 0].tolist() == [1]


@pytest.mark.parametrize(("width", "height"), [(100, 50), (33, 90), (64, 64), (7, 200)])
def test_letterbox_keeps_aspect_and_its_frame_inverts_it(width, height):
    rows = np.array([[0, 1, 2, width - 1, height - 2, 1]], np.float32)
    square, frame = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    moved = boxed(rows, frame)
    scale, pad_x, pad_y = frame[:3]
    back = (moved[:, 1:5] - [pad_x, pad_y, pad_x, pad_y]) / scale
    np.testing.assert_allclose(back, rows[:, 1:5], atol=1e-3)
    assert square.shape == (64, 64, 3)
    assert (moved[:, 1:5] >= 0).all()
    assert (moved[:, 1:5] <= 64).all()


def test_flips_are_independent_and_follow_the_key():
    change = Augment(AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, fliplr=0.5, flipud=0.5))
    image = np.zeros((8, 8, 3), np.uint8)
    image[0, 0] = 255
    rows = np.array([[3, 0, 0, 4, 4, 1]], np.float32)
    corners = []
    for i in range(400):
        pixels, moved = change(image, rows, (0, i))
        y, x = np.argwhere(pixels[..., 0] == 255)[0]
        corners.append((int(x), int(y)))
        assert moved[0].tolist() == [
            3,
            4 if x else 0,
            4 if y else 0,
            8 if x else 4,
            8 if y else 4,
            1,
        ]
        again, _ = change(image, rows, (0, i))
        assert np.array_equal(again, pixels)
    counts = [corners.count(c) for c in ((0, 0), (0, 7), (7, 0), (7, 7))]
    assert min(counts) > 70  # 100 expected, s = 8.7: correlated flips leave two at 0


def test_rows_keep_class_and_weight_and_none_is_fine():
    change = Augment(AugmentConfig(fliplr=1.0))
    image = np.full((16, 16, 3), 90, np.uint8)
    rows = np.array([[2**20, 1, 2, 9, 12, 0.25], [1, 0, 0, 0, 5, 1]], np.float32)
    _, moved = change(image, rows, (1,))
    assert moved.tolist() == [[2**20, 7, 2, 15, 12, 0.25]]  # the empty box is gone
    assert change(image, rows[:0], (1,))[1].shape == (0, 6)
