"""Samples for classification: the same however they are read, and what mixing leaves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import MemoryImages

from visiontrain.core.errors import DataError
from visiontrain.core.seed import uniforms
from visiontrain.data.build import whole_images
from visiontrain.data.class_dataset import LabelledEval, LabelledTraining
from visiontrain.data.config import ClassifyAugment, NoAugment
from visiontrain.data.letterbox import GREY
from visiontrain.data.policy import OPERATIONS, apply_policy
from visiontrain.data.views import TRIES, FileViews, SmallViews, build_views, flipped, random_crop

SIDE, COUNT = 32, 12
RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 255, (SIDE, SIDE, 3), np.uint8) for _ in range(COUNT)]
ALL = {"translate": 0.1, "mixup": 0.4, "cutmix": 0.4, "erasing": 0.5, "flipud": 0.3}
MOVES = ClassifyAugment(crop=1.0, translate=0.2, flipud=0.5)


def table(pictures=PICTURES, broken=()):
    count = len(pictures)
    sizes = np.array([p.shape[1::-1] for p in pictures], np.int32)
    labels = np.arange(count) % 4
    images = MemoryImages(pictures, set(broken))
    return whole_images(tuple("abcd"), images, sizes, labels, np.ones(count, np.int64))


def training(augment, pictures=PICTURES, seed=0, broken=()):
    return LabelledTraining(table(pictures, broken), SIDE, augment, seed=seed, epochs=4)


SETS = {
    "small": training(ClassifyAugment(crop=1.0, **ALL)),
    "files": training(ClassifyAugment(crop=0.3, auto="randaugment", **ALL)),
}
FIELDS = ("images", "ids", "frame", "valid")


@pytest.mark.parametrize("kind", SETS)
@settings(max_examples=15)
@given(rows=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=8, unique=True))
def test_a_sample_is_the_same_in_any_batch(kind, rows):
    whole = SETS[kind].cell([(3, row) for row in rows], 0)
    for k, row in enumerate(rows):
        alone = SETS[kind].cell([(3, row)], 7)
        assert all(torch.equal(getattr(alone, n)[0], getattr(whole, n)[k]) for n in FIELDS)
        own = alone.targets.shape[1]
        assert torch.equal(alone.targets[0], whole.targets[k, :own])
        assert (whole.targets[k, own:, 0] == -1).all()


def test_other_epochs_and_seeds_are_other_samples():
    first = SETS["small"].cell([(0, 1)], 0).images
    assert not torch.equal(first, SETS["small"].cell([(1, 1)], 0).images)
    other = training(ClassifyAugment(crop=1.0, **ALL), seed=1)
    assert not torch.equal(first, other.cell([(0, 1)], 0).images)


@pytest.mark.parametrize("auto", ["trivial", "randaugment"])
def test_policies_change_pictures_in_memory_as_those_of_files(auto):
    rows, stream = np.arange(20 * COUNT), (5, 2, "own")
    config = MOVES.model_copy(update={"auto": auto})
    assert isinstance(build_views(table(), SIDE, config), SmallViews)
    small, files = (kind(table(), SIDE, config)(rows, stream) for kind in (SmallViews, FileViews))
    assert np.array_equal(small[0], files[0])
    plain = SmallViews(table(), SIDE, MOVES)(rows, stream)[0]
    assert 0.5 < (small[0] != plain).any(axis=(1, 2, 3)).mean() < 1


@pytest.mark.parametrize("translate", [0.0, 0.2])
def test_whole_batches_are_moved_as_single_pictures_are(translate):
    rows, stream = np.arange(4 * COUNT), (5, 2, "own")
    config = MOVES.model_copy(update={"translate": translate})
    small, files = (kind(table(), SIDE, config)(rows, stream) for kind in (SmallViews, FileViews))
    assert np.array_equal(small[0], files[0])
    assert np.array_equal(small[1], files[1])
    for turned in (np.array, np.flipud, np.fliplr, lambda p: p[::-1, ::-1]):
        same = [np.array_equal(turned(PICTURES[k % COUNT]), small[0][k]) for k in rows]
        assert any(same) or translate


def test_every_picture_is_mirrored_in_every_other_epoch():
    rows = np.arange(1000)
    first, second, third = (flipped(rows, (0, epoch, "own"), 0.5) for epoch in range(3))
    assert np.array_equal(first, third)
    assert np.array_equal(first, ~second)
    assert 400 < first.sum() < 600
    assert 150 < flipped(rows, (0, 0, "own"), 0.2).sum() < 250


def test_shares_of_classes_are_those_of_the_picture():
    """Pictures of one value each: how much of either is in a mixture can be counted."""
    plain = [np.full((SIDE, SIDE, 3), 20 * k, np.uint8) for k in range(COUNT)]
    batch = training(ClassifyAugment(crop=1.0, cutmix=1.0), plain).cell(
        [(0, row) for row in range(COUNT)], 0
    )
    label = {20 * k: k % 4 for k in range(COUNT)}
    for image, targets in zip(batch.images, batch.targets, strict=True):
        values, counts = image[0].unique(return_counts=True)
        found = torch.zeros(4)
        for value, count in zip(values.tolist(), counts.tolist(), strict=True):
            found[label[value]] += count / SIDE**2
        wanted = torch.zeros(4).scatter_add_(0, targets[:, 0].long(), targets[:, 5])
        torch.testing.assert_close(found, wanted)
        assert targets[:, 5].sum() == pytest.approx(1)


def test_blended_pictures_weigh_as_their_classes_do():
    plain = [np.full((SIDE, SIDE, 3), 255 * (k % 2), np.uint8) for k in range(COUNT)]
    batch = training(ClassifyAugment(crop=1.0, mixup=1.0), plain).cell(
        [(0, row) for row in range(COUNT)], 0
    )
    white = (batch.targets[..., 0].long() % 2 * batch.targets[..., 5]).sum(1)
    torch.testing.assert_close(batch.images[:, 0, 0, 0] / 255, white, atol=0.005, rtol=0)


def test_what_is_erased_is_a_grey_rectangle_of_the_paper_s_sizes():
    """Of Zhong et al.: 0.02 to 0.33 of the area, sides up to 3.3 to 1, in a share of pictures."""
    side, white = 200, [np.full((200, 200, 3), 255, np.uint8)] * 4
    shares, ratios = [], []
    for share in (1.0, 0.5):
        augment = ClassifyAugment(crop=1.0, fliplr=0.0, erasing=share)
        data = LabelledTraining(table(white), side, augment, seed=0, epochs=1)
        grey = (data.cell([(0, entry) for entry in range(400)], 0).images == GREY).all(1)
        erased = grey.flatten(1).any(1)
        assert erased.float().mean() == pytest.approx(share, abs=0.07)
        for one in grey[erased]:
            high, wide = int(one.any(1).sum()), int(one.any(0).sum())
            assert one.sum() == high * wide  # a rectangle
            shares.append(high * wide / side**2)
            ratios.append(wide / high)
    assert 0.019 < min(shares) < 0.03
    assert 0.31 < max(shares) < 0.335
    assert 1 / 3.4 < min(ratios) < 1 / 3
    assert 3 < max(ratios) < 3.4


@settings(max_examples=40)
@given(
    sides=st.tuples(st.integers(100, 400), st.integers(100, 400)),
    least=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
def test_a_crop_has_its_share_of_the_pixels_and_its_shape(sides, least, seed):
    picture = np.zeros((sides[1], sides[0]), np.uint8)
    middle = min(sides)
    for draws in uniforms((seed, "crop"), np.arange(40), 2 * TRIES + 2):
        x, y, width, height = random_crop(*sides, least, draws)
        cut = picture[y : y + height, x : x + width]
        assert cut.size == width * height  # inside
        if (width, height) == (middle, middle):
            continue  # maybe since none fits: the largest square in the middle
        ratio = width / height
        slack = 1 + 1 / min(width, height)  # of rounding to whole pixels
        assert least / slack < cut.size / picture.size <= 1
        assert 3 / 4 / slack < ratio < 4 / 3 * slack


def test_crops_reach_all_shares_and_shapes():
    draws = uniforms((0, "crop"), np.arange(2000), 2 * TRIES + 2)
    crops = np.array([random_crop(300, 300, 0.1, row) for row in draws])
    shares, ratios = crops[:, 2] * crops[:, 3] / 300**2, crops[:, 2] / crops[:, 3]
    assert shares.min() < 0.11
    assert shares.max() > 0.95
    assert ratios.min() < 0.77
    assert ratios.max() > 1.3
    assert crops[:, :2].min() == 0
    assert (crops[:, :2] + crops[:, 2:]).max() == 300


def test_what_cannot_be_read_is_replaced_by_the_next():
    for augment in (MOVES, ClassifyAugment(crop=0.5)):
        batch = training(augment, broken={3, 4}).cell([(0, 3), (0, 5)], 0)
        assert batch.ids.tolist() == [5, 5]
        assert batch.targets[:, 0, 0].tolist() == [1, 1]
    with pytest.raises(DataError, match="no image can be read"):
        training(MOVES, broken=set(range(COUNT)))
    scored = LabelledEval(table(broken={3}), SIDE).cell([3])
    assert (scored.ids.tolist(), scored.valid.tolist()) == ([3], [0])
    assert (scored.images == 114).all()


def test_no_rows_are_one_blank_picture():
    for data in (SETS["small"].cell([], 0), LabelledEval(table(), SIDE).cell([])):
        assert data.valid.tolist() == [0]
        assert data.images.shape == (1, 3, SIDE, SIDE)


def test_scored_is_the_middle_square():
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 200
    data = LabelledEval(table([picture]), SIDE)
    assert (data.cell([0]).images == 200).all()
    plain = training(NoAugment(), [picture]).cell([(0, 0)], 0)
    assert torch.equal(plain.images, data.cell([0]).images)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_keeps_shape_and_type_and_changes_nothing_without_strength(name):
    coarse = np.random.default_rng(3).integers(0, 255, (8, 8, 3), np.uint8)
    picture = np.kron(coarse, np.ones((4, 4, 1), np.uint8))
    changed = [OPERATIONS[name](picture.copy(), s, 1) for s in (0.0, 0.3, 1.0)]
    assert {(c.shape, c.dtype) for c in changed} == {(picture.shape, picture.dtype)}
    if name not in ("identity", "autocontrast", "equalize"):
        weak, medium, strong = (np.abs(c.astype(int) - picture).mean() for c in changed)
        assert weak <= 1 < min(medium, strong)


def test_policies_draw_all_operations():
    picture = PICTURES[0]
    draws = uniforms((0, "policy"), np.arange(300), 6)
    for policy in ("trivial", "randaugment"):
        made = {apply_policy(picture, policy, row).tobytes() for row in draws}
        assert len(made) > 100 if policy == "trivial" else len(made) > 60


def test_numbers_for_rows_are_even_and_hang_on_the_row_alone():
    draws = uniforms((0, "x"), np.arange(20000), 2)
    assert np.array_equal(draws[[7, 3]], uniforms((0, "x"), np.array([7, 3]), 2))
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / 2000 - 1).max() < 0.1
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03
    assert not np.array_equal(draws, uniforms((1, "x"), np.arange(20000), 2))


def test_labels_without_any_class_train_too():
    several = replace(
        table(), offsets=np.arange(COUNT + 1) // 2 * 1, classes=np.zeros(COUNT // 2, np.int32)
    )
    data = LabelledTraining(several, SIDE, MOVES, seed=0, epochs=1)
    batch = data.cell([(0, row) for row in range(4)], 0)
    assert batch.targets[:, 0, 0].tolist() == [-1, 0, -1, 0]
