"""The embedded scenes: real digits, fixed by split and index, boxed tightly."""

import json
import time
from importlib.resources import files

import numpy as np
import pytest
from layouts import opened

from visiontrain.data import digits
from visiontrain.data.digits import DigitScenes, Recipe, compose, load_glyphs


def test_splits_share_no_digit_and_leave_none_out():
    glyphs = {split: load_glyphs(split) for split in digits.SHARES}
    counts = [len(labels) for _, labels in glyphs.values()]
    assert sum(counts) == 1797
    assert [round(count / 1797, 2) for count in counts] == [0.70, 0.15, 0.15]
    pictures = [{glyph.tobytes() for glyph in cells} for cells, _ in glyphs.values()]
    assert not pictures[0] & pictures[1] | pictures[0] & pictures[2] | pictures[1] & pictures[2]
    for _, labels in glyphs.values():
        assert np.bincount(labels, minlength=10).min() >= 24


def test_the_asset_names_its_source_and_licence():
    about = json.loads(files("visiontrain.data").joinpath("assets/digits.json").read_text())
    assert "CC BY 4.0" in about["licence"]
    assert about["url"].startswith("https://archive.ics.uci.edu/")
    assert len(about["labels"]) == 1797


def test_a_scene_depends_on_split_and_index_alone():
    few, many = (DigitScenes(Recipe(), "val", count) for count in (4, 9))
    assert np.array_equal(few.digits, many.digits[: len(few.digits)])
    assert all(np.array_equal(few.read(row), many.read(row)) for row in range(4))
    other = DigitScenes(Recipe(), "test", 4)
    assert not any(np.array_equal(few.read(row), other.read(row)) for row in range(4))
    assert (few.name(3), few.read(3).shape) == ("digits/val/000003", (160, 160, 3))


def test_boxes_are_tight_and_hardly_overlap(monkeypatch):
    table = compose(Recipe(), "train", 60)
    monkeypatch.setattr(digits, "add_noise", lambda image, _: image)
    inked = [table.images.read(row) for row in range(60)]
    monkeypatch.setattr(digits, "add_ink", lambda *_: None)
    for row in range(60):
        changed = (inked[row] != table.images.read(row)).any(axis=2)
        boxes = table.boxes[table.rows(row)].astype(int)
        assert 2 <= len(boxes) <= 8
        shared = digits.overlaps(boxes, boxes) - np.eye(len(boxes))
        assert shared.max() <= digits.MAX_OVERLAP
        for x1, y1, x2, y2 in boxes:
            ink = changed[y1:y2, x1:x2]
            assert all(side.any() for side in (ink[0], ink[-1], ink[:, 0], ink[:, -1]))
        for x1, y1, x2, y2 in boxes:
            changed[y1:y2, x1:x2] = False
        assert not changed.any()


def test_digits_stand_out_from_what_is_under_them():
    table = compose(Recipe(), "train", 40)
    contrasts = []
    for row in range(40):
        grey = table.images.read(row).mean(axis=2)
        for glyph, width, height, x1, y1, x2, y2 in table.images.digits[table.rows(row)]:
            ink = digits.enlarge(table.images.glyphs[glyph], width, height)
            patch = grey[y1:y2, x1:x2]
            if (ink < 0.05).any():
                contrasts.append(patch[ink > 0.9].mean() - patch[ink < 0.05].mean())
    assert min(map(abs, contrasts)) > 15
    assert 0.25 < np.mean(np.array(contrasts) > 0) < 0.75  # both polarities


def test_composing_is_fast_enough_to_need_no_cache():
    scenes = DigitScenes(Recipe(), "train", 50)
    start = time.process_time()
    for row in range(50):
        scenes.read(row)
    assert (time.process_time() - start) / 50 < 0.02  # measured: 1 ms; slack for slow machines


@pytest.mark.parametrize("name", ["digits", "tiny"])
def test_the_shipped_sets_compose_what_they_promise(name, tmp_path):
    spec = opened(name, tmp_path)
    assert spec.names == tuple("0123456789")
    assert {split: len(spec.table(split)) for split in ("val", "test")} == {
        split: spec.splits[split] for split in ("val", "test")
    }
    more = opened(name, tmp_path, train_images=30, fraction=0.5)
    assert len(more.table("train")) == 15
