"""Data sets that users pass in Python: what is read of them, what is said of what does not fit."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

import visiontrain as vt
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.own import named
from visiontrain.data.config import ClassifyAugment, DataConfig
from visiontrain.data.header import ImageError
from visiontrain.data.open import open_dataset
from visiontrain.data.order import SHUFFLED
from visiontrain.data.samples import training_set

GREY = np.full((20, 30, 3), 128, np.uint8)


def opened(*samples, names=("cat", "dog"), **keys):
    own = named("data", vt.Data(list(samples), list(samples), names))
    return open_dataset(DataConfig(own=own, **keys))


def test_boxes_become_a_table():
    spec = opened(
        vt.Sample(GREY, [1, 0], [[2, 3, 12, 13], [-5, 0, 40, 20]]), vt.Sample(GREY[:10], [], [])
    )
    table = spec.table("train")
    assert (spec.task, table.names) == ("detect", ("cat", "dog"))
    assert table.sizes.tolist() == [[30, 20], [30, 10]]
    assert table.offsets.tolist() == [0, 2, 2]
    assert table.boxes.tolist() == [[2, 3, 12, 13], [0, 0, 30, 20]]  # clipped
    assert [defect.kind for defect in table.defects] == ["box-outside"]
    assert np.array_equal(table.images.read(1), GREY[:10])


def test_classes_become_a_table():
    one = opened(vt.Sample(GREY, 1), vt.Sample(GREY, 0)).table("train")
    assert (one.task, one.several, one.classes.tolist()) == ("classify", False, [1, 0])
    some = opened(vt.Sample(GREY, [0, 1]), vt.Sample(GREY, [])).table("train")
    assert (some.several, some.offsets.tolist()) == (True, [0, 2, 2])


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (vt.Sample(GREY, 2), "train[1]: class 2; `names` has 2 classes"),
        (vt.Sample(GREY, [0, 1]), "train[1]: 2 classes, where the first sample"),
        (vt.Sample(GREY / 255, 0), "train[1]: image: float64 (20, 30, 3); give a numpy array"),
        ((GREY, 0), "train[1]: a tuple; return a visiontrain.Sample, or wrap"),
    ],
)
def test_what_is_no_sample_is_named(sample, reason):
    with pytest.raises(DataError) as error:
        opened(vt.Sample(GREY, 0), sample).table("train")
    assert str(error.value).startswith(reason)


@pytest.mark.parametrize(
    ("first", "classes", "reason"),
    [
        (0, 0.7, "0.7; give the number of a class, from 0 on, or a list of such whole numbers"),
        (0, "cat", "'cat'; give the number"),
        (0, None, "None; give the number"),
        (0, True, "True; give the number"),
        ([], [0.0, 1.0], "[0.0, 1.0]; give the number"),
        ([], [[0], [0, 1]], "[[0], [0, 1]]; give the number"),
        ([], [[0, 1]], "[[0, 1]]; give the number"),
        ([], [1, 1], "[1, 1], with one of them twice; give each once, and of a row of zeros and"),
        ([], [1, 0, 0], "[1, 0, 0], with one of them twice"),
    ],
)
def test_classes_that_are_no_numbers_of_classes_are_named(first, classes, reason):
    with pytest.raises(DataError) as error:
        opened(vt.Sample(GREY, first), vt.Sample(GREY, classes)).table("train")
    assert str(error.value).startswith(f"train[1]: classes: {reason}")


def test_boxes_among_whole_images_are_named():
    """What the first sample lacks decides: an empty one before others would lose their boxes."""
    with pytest.raises(
        DataError, match=r"train\[1\]: boxes, where train\[0\] has none, .* boxes=\["
    ):
        opened(vt.Sample(GREY, []), vt.Sample(GREY, [0], [[1, 2, 12, 13]])).table("train")


def test_names_are_a_list_or_numbered():
    numbered = opened(vt.Sample(GREY, 0), names={1: "dog", 0: "cat"})
    assert numbered.names == ("cat", "dog")
    for names in ("cat", {0: "cat", 2: "dog"}, 5):
        with pytest.raises(ConfigError, match=r"data: names: .*; give a list of names"):
            opened(vt.Sample(GREY, 0), names=names)


@pytest.mark.parametrize(
    "image", [GREY.astype(np.float32), (GREY / 128 - 1.5), np.full((2, 2), np.nan)]
)
def test_floats_outside_of_0_to_1_are_no_picture(image):
    """Normalised ones would become black and white without a word."""
    data = vt.TorchData([(image, 0)])
    with pytest.raises(
        DataError, match=r"train\[0\]: an image of floats from .*leave Normalize out"
    ):
        open_dataset(DataConfig(own=named("data", vt.Data(data, data, ["cat"]))))


def test_a_data_set_is_read_by_one_thread():
    """One with a single open file would give pictures to the labels of others."""
    readers = set()

    class Read(list):
        def __getitem__(self, index):
            readers.add(threading.get_ident())
            return super().__getitem__(index)

    samples = Read(vt.Sample(GREY, k % 2) for k in range(40))
    table = open_dataset(DataConfig(own=named("data", vt.Data(samples, samples, ["a", "b"]))))
    training_set(
        table.table("train"), 32, ClassifyAugment(crop=1.0), seed=0, epochs=1, order=SHUFFLED
    )
    assert readers == {threading.get_ident()}


def test_classes_of_boxes_are_whole_numbers_too():
    box = [[1, 2, 12, 13]]
    with pytest.raises(DataError, match=r"^train\[1\]: classes: \['cat'\]; give the number of a"):
        opened(vt.Sample(GREY, [0], box), vt.Sample(GREY, ["cat"], box)).table("train")
    with pytest.raises(DataError, match=r"^train\[1\]: classes: \[0.5\]; give the number of a"):
        opened(vt.Sample(GREY, [0], box), vt.Sample(GREY, [0.5], box)).table("train")
    for kind in (np.int64, np.float32):  # a column of an array of boxes
        columns = vt.Sample(GREY, np.array([[1], [1]], kind), [*box, [3, 3, 9, 9]])
        assert opened(columns).table("train").classes.tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["P", "RGBA", "1", "CMYK", "LA"])
def test_pictures_of_pil_are_taken_as_colours_whatever_their_mode(mode):
    red = Image.new("RGB", (6, 4), (255, 0, 0)).convert(mode)
    pixels = vt.TorchData([(red, 0)])[0].image
    assert pixels.shape == (4, 6, 3)
    assert np.array_equal(pixels, np.asarray(red.convert("RGB")))


def test_deep_pictures_of_pil_are_not_cut_off():
    deep = vt.TorchData([(Image.new("I;16", (30, 20), 5000), 0)])
    with pytest.raises(DataError, match=r"^train\[0\]: image: uint16 \(20, 30, 3\); give a numpy"):
        open_dataset(DataConfig(own=named("data", vt.Data(deep, deep, ["cat"]))))


def test_an_error_of_the_users_is_one_line():
    class Broken(list):
        def __getitem__(self, index):
            raise FileNotFoundError("a.png")

    with pytest.raises(DataError, match=r"train\[0\]: FileNotFoundError: a.png; mend it"):
        open_dataset(DataConfig(own=named("data", vt.Data(Broken([1]), Broken([1]), ["a"]))))


def test_an_error_of_ours_in_a_data_set_is_one_of_its_sample():
    """A data set may read pictures with our own tools."""

    class Damaged(list):
        def __getitem__(self, index):
            raise ImageError("a.png", "truncated-image", "ends early")

    with pytest.raises(DataError, match=r"train\[0\]: a.png: .*ends early"):
        open_dataset(DataConfig(own=named("data", vt.Data(Damaged([1]), Damaged([1]), ["a"]))))


def test_torch_data_sets_are_understood():
    boxes = torch.tensor([[1.0, 2, 3, 4]])
    items = [
        (torch.rand(3, 8, 9), torch.tensor(1)),
        (GREY[..., 0], 0),
        (torch.zeros(1, 8, 9), {"boxes": boxes, "labels": torch.tensor([1])}),
    ]
    data = vt.TorchData(items)
    assert [data[k].image.shape for k in range(len(data))] == [(8, 9, 3), (20, 30, 3), (8, 9, 3)]
    assert [data[0].classes, data[1].classes, data[2].classes.tolist()] == [1, 0, [1]]
    assert data[2].boxes.tolist() == boxes.tolist()
    assert np.allclose(data[0].image / 255, items[0][0].permute(1, 2, 0), atol=0.002)
    for item in (("name", GREY), (GREY, torch.tensor(0.7))):
        with pytest.raises(ConfigError, match="convert="):
            vt.TorchData([item])[0]


def test_boxes_of_torchvision_say_how_they_are_meant_and_may_be_none():
    """As its wrapper of COCO gives them: a picture without objects has no key of boxes."""
    boxes = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYWH", canvas_size=(20, 30))
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    with pytest.raises(ConfigError, match=r"boxes in XYWH; give BoundingBoxes in XYXY"):
        vt.TorchData([(GREY, target)])[0]
    target["boxes"] = tv_tensors.BoundingBoxes([[1, 2, 3, 4]], format="XYXY", canvas_size=(20, 30))
    data = vt.TorchData([(GREY, target), (GREY, {"image_id": 7})])
    assert [len(data[k].classes) for k in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("key", "value"), [("window", 3), ("max_pixels", 100), ("cache", "disk"), ("cache_dir", "x")]
)
def test_keys_that_mean_nothing_to_a_data_set_in_python_are_refused(key, value):
    with pytest.raises(ConfigError, match=rf"data.{key}: {value}, but builtins:list is a data"):
        opened(vt.Sample(GREY, 0), **{key: value})


def test_of_a_single_class_a_box_that_is_there_twice_is_one():
    sample = vt.Sample(GREY, [0, 1], [[5, 5, 15, 15], [5, 5, 15, 15]])
    data = named("data", vt.Data([sample], [sample], ["a", "b"]))
    several, one = (
        open_dataset(DataConfig(own=data, single_cls=single)).table("train")
        for single in (False, True)
    )
    assert (several.classes.tolist(), one.classes.tolist()) == ([0, 1], [0])
    assert [defect.kind for defect in one.defects] == ["duplicate-box"]
