"""Augmentation: boxes go where their pixels go, draws are independent and repeatable."""

import cv2
import numpy as np
import pytest
from memory import memory_table

from visiontrain.core.seed import generator
from visiontrain.data.augment import Augment
from visiontrain.data.config import AugmentConfig
from visiontrain.data.dataset import TrainSet
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
    rows = np.array([[2**20, 1, 2, 9, 12, 0.25]], np.float32)
    _, moved = change(image, rows, (1,))
    assert moved.tolist() == [[2**20, 7, 2, 15, 12, 0.25]]
    assert rows[0, 1] == 1  # the table's own rows stay
    assert change(image, rows[:0], (1,))[1].shape == (0, 6)


def test_colours_are_scaled_not_shifted():
    """Black stays black and grey grey; saturation and brightness change by a share."""
    change = Augment(AugmentConfig(fliplr=0, hsv_h=0, hsv_s=0.5, hsv_v=0.25))
    image = np.zeros((1, 3, 3), np.uint8)
    image[0, 1:] = (100, 100, 100), (130, 110, 110)
    greys, spreads = [], []
    for i in range(200):
        pixels, _ = change(image, np.zeros((0, 6), np.float32), (0, i))
        black, grey, reddish = pixels[0]
        assert not black.any()
        assert grey.min() == grey.max()
        greys.append(grey[0] / 100)
        spreads.append((int(reddish[0]) - int(reddish[1])) / 20 / greys[-1])
    assert 0.74 <= min(greys) < 0.8 < 1.2 < max(greys) <= 1.26
    assert 0.4 <= min(spreads) < 0.6 < 1.4 < max(spreads) <= 1.6


@pytest.mark.parametrize("mosaic", [0.0, 1.0])
def test_boxes_of_whole_samples_lie_where_their_pixels_are(mosaic):
    """Every patch has its box, but for those of which little remains; every box has its patch."""
    config = AugmentConfig(
        mosaic=mosaic, close_mosaic=0, flipud=0.5, scale=0.2, hsv_h=0, hsv_s=0, hsv_v=0
    )
    table = painted_table(4)
    data = TrainSet(table, 96, config, seed=1, epochs=8)
    boxes = 0
    for epoch in range(8):
        for row in range(4):
            sample = data[epoch, row]
            boxes += len(sample.targets)
            for index in range(4):
                of_class = sample.targets[sample.targets[:, 0] == index, 1:5]
                shown = patches(sample.image, index)
                places = np.reshape(shown, (-1, 4))
                for box in of_class:
                    assert np.abs(places - box).max(1).min(initial=np.inf) <= 1.0
                for patch in shown:
                    gap = np.abs(of_class - patch).max(1).min() if len(of_class) else np.inf
                    x1, y1, x2, y2 = patch
                    share = (x2 - x1) * (y2 - y1) / (table.area[index] * 1.28**2)  # largest zoom
                    little = min(x2 - x1, y2 - y1) <= 3 or share < 0.11
                    assert gap <= 1.0 or little
    assert boxes > 24


def painted_table(images):
    """Return a table whose image i has one rectangle of colour i, clear of the border."""
    parts = [painted(90, 70, i, generator("table", i)) for i in range(images)]
    pictures = []
    for image, rows in parts:
        rows[0, 1:3] += 4
        rows[0, 3:5] -= 4
        x1, y1, x2, y2 = rows[0, 1:5].astype(int)
        colour = image[y1, x1].copy()
        image[...] = 0
        image[y1:y2, x1:x2] = colour
        pictures.append(image)
    return memory_table(pictures, [rows[:, :5] for _, rows in parts])


def patches(canvas, index):
    """Return the boxes (x1, y1, x2, y2) of the connected patches of colour `index`."""
    near = (np.abs(canvas.astype(int) - COLOURS[index]).max(-1) < 128).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(near)
    return [np.array([x, y, x + w, y + h]) for x, y, w, h, _ in stats[1:]]


def test_mosaic_ends_before_the_run_does():
    """`close_mosaic` epochs at the end go without, at most half of them."""
    table = memory_table([np.full((64, 64, 3), 60 * i, np.uint8) for i in range(4)])

    def colours(epochs, epoch):
        config = AugmentConfig(close_mosaic=3, scale=0, translate=0, hsv_h=0, hsv_s=0, hsv_v=0)
        data = TrainSet(table, 64, config, seed=0, epochs=epochs)
        return max(len(np.unique(data[epoch, row].image)) for row in range(4))

    assert [colours(8, e) > 1 for e in range(8)] == [True] * 5 + [False] * 3
    assert [colours(4, e) > 1 for e in range(4)] == [True] * 2 + [False] * 2
    assert colours(1, 0) > 1
