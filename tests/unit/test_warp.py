"""Turning, shearing, tilting, blending, pasting: boxes go where their pixels go."""

import numpy as np
import pytest
from memory import memory_table

from visiontrain.core.errors import ConfigError
from visiontrain.core.seed import generator
from visiontrain.data.augment import Augment, custom_transform
from visiontrain.data.config import AugmentConfig
from visiontrain.data.dataset import TrainSet
from visiontrain.data.warp import blend, covers, draw_matrix, move, paste, warp

SIDE = 120
PLAIN = {"scale": 0, "translate": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "fliplr": 0}


def scene(*boxes):
    """Return a black canvas with white boxes, and their rows."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        image[y1:y2, x1:x2] = 255
    return image, np.array([[i, *box, 1] for i, box in enumerate(boxes)], np.float32)


def extent(image):
    ys, xs = (image.min(-1) > 128).nonzero()
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize(
    "keys", [{"degrees": 40}, {"shear": 25}, {"perspective": 0.5}, {"degrees": 180, "shear": 10}]
)
@pytest.mark.parametrize("seed", range(6))
def test_boxes_surround_what_their_pixels_become(keys, seed):
    image, rows = scene((44, 40, 80, 72))
    matrix = draw_matrix(AugmentConfig(**keys), SIDE, generator("warp", seed))
    seen, moved = warp(image, rows, matrix)
    assert np.abs(extent(seen) - moved[0, 1:5]).max() <= 1.5
    assert not np.array_equal(seen, image)


def test_a_quarter_turn_is_exact():
    image, rows = scene((10, 30, 50, 40))
    quarter = np.array([[0.0, -1, SIDE], [1, 0, 0], [0, 0, 1]])
    seen, moved = warp(image, rows, quarter)
    assert np.array_equal(seen, np.rot90(image, -1))
    assert moved[0, 1:5].tolist() == extent(seen).tolist() == [80, 10, 90, 50]


def test_nothing_asked_for_changes_nothing_and_what_leaves_the_canvas_is_dropped():
    _, rows = scene((10, 30, 50, 40))
    matrix = draw_matrix(AugmentConfig(), SIDE, generator("none"))
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-12)
    away = np.array([[1.0, 0, 200], [0, 1, 0], [0, 0, 1]])
    assert len(move(rows, away, SIDE)) == 0
    assert move(rows[:0], away, SIDE).shape == (0, 6)


def test_blending_keeps_all_boxes_and_mixes_all_pixels():
    one, other = scene((10, 10, 40, 40)), scene((60, 60, 100, 100), (5, 90, 30, 110))
    image, rows = blend(one, other, generator("blend"))
    assert np.array_equal(rows, np.concatenate([one[1], other[1]]))
    assert 60 < image[20, 20, 0] < 195
    assert image[20, 20, 0] + image[80, 80, 0] in (254, 255, 256)


@pytest.mark.parametrize("seed", range(10))
def test_pasted_objects_bring_their_pixels_and_hide_little(seed):
    one = scene((0, 0, 60, 60))
    other = scene((70, 20, 100, 40), (10, 100, 25, 118))
    other[0][20:40, 70:100] = (200, 10, 10)
    image, rows = paste(one, other, generator("paste", seed))
    assert np.array_equal(rows[0], one[1][0])
    for row in rows[1:]:
        x1, y1, x2, y2 = row[1:5].astype(int)
        source = other[1][int(row[0])]
        sx1, sy1, sx2, sy2 = source[1:5].astype(int)
        assert (x2 - x1, y2 - y1) == (sx2 - sx1, sy2 - sy1)
        later = [r for r in rows[1:] if r is not row]
        if not any(covers([row], tuple(r[1:5])) for r in later):
            middle = image[(y1 + y2) // 2, (x1 + x2) // 2]
            assert np.array_equal(middle, other[0][(sy1 + sy2) // 2, (sx1 + sx2) // 2])


def test_samples_with_everything_on_repeat_and_differ_from_plain_ones():
    pictures = [scene((20 + 10 * i, 30, 70, 90))[0] for i in range(4)]
    boxes = [scene((20 + 10 * i, 30, 70, 90))[1][:, :5] for i in range(4)]
    table = memory_table(pictures, boxes)
    keys = {"degrees": 20, "shear": 5, "perspective": 0.2, "mixup": 1.0, "copy_paste": 1.0}
    sets = [
        TrainSet(table, 96, AugmentConfig(mosaic=0, **PLAIN, **more), seed=3, epochs=4)
        for more in (keys, keys, {})
    ]
    samples = [data[1, 2] for data in sets]
    assert np.array_equal(samples[0].image, samples[1].image)
    assert np.array_equal(samples[0].targets, samples[1].targets)
    assert not np.array_equal(samples[0].image, samples[2].image)
    assert len(samples[0].targets) > len(samples[2].targets)


def test_transforms_of_albumentations_are_taken_by_name():
    keys = {"custom": [{"name": "InvertImg", "p": 1.0}]}
    image, rows = scene((10, 10, 40, 40))
    change = Augment(AugmentConfig(**PLAIN, **keys))
    inverted, same = change(image, rows, (0, 0))
    assert np.array_equal(inverted, 255 - image)
    assert np.array_equal(same, rows)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "Blurr"}, "no image transform 'Blurr' in albumentations; did you mean Blur?"),
        ({"name": "Rotate"}, "no image transform 'Rotate'"),  # it would move boxes
        ({"name": "Blur", "blur": 3}, "Blur: .*blur"),
        ({"name": "Blur", "blur_limit": "x"}, "Blur: "),
        ({}, "no image transform 'None'"),
        ({"name": "Normalize", "p": 0.1}, r"Normalize: turns uint8 \(64, 64, 3\) into float32"),
        ({"name": "ToFloat"}, "ToFloat: turns uint8 "),
        ({"name": "TextImage", "font_path": "none.ttf"}, "TextImage: "),
    ],
)
def test_what_albumentations_does_not_take_is_one_line(entry, message):
    with pytest.raises(ConfigError, match=f"^augment.custom: {message}") as caught:
        custom_transform(entry)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["mixup", "copy_paste"])
def test_each_brings_objects_of_other_pictures(key):
    scenes = [scene((10 + 10 * k, 10, 30 + 10 * k, 30)) for k in range(4)]
    boxes = [rows[:, :5].copy() for _, rows in scenes]
    for label, rows in enumerate(boxes):
        rows[:, 0] = label
    table = memory_table([image for image, _ in scenes], boxes)
    data = TrainSet(table, 96, AugmentConfig(mosaic=0, **PLAIN, **{key: 1.0}), seed=3, epochs=4)
    found = [data[e, row].targets[:, 0].tolist() for e in range(4) for row in range(4)]
    assert [classes[0] for classes in found] == [0, 1, 2, 3] * 4
    assert max(len(set(classes)) for classes in found) == 2


def test_what_is_pasted_hides_little_of_what_is_there():
    one, other = scene((50, 50, 60, 60)), scene((10, 10, 50, 50))
    other[0][10:50, 10:50] = (200, 10, 10)
    pasted = 0
    for seed in range(30):
        image, rows = paste(one, other, generator("hides", seed))
        pasted += len(rows) - 1
        assert (image[50:60, 50:60] == 255).all(-1).mean() > 0.69
    assert 0 < pasted < 30
