"""batch=-1: what a forward pass keeps, and what is made of it."""

from dataclasses import replace

import pytest
import torch

from visiontrain.engine.autobatch import Room, fitting_batch, kept_bytes
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.recipe import scored_at_once

ROOM = Room(free=2**40, images=10_000, processes=1, accumulate=1, device="cuda")


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return build_model(YoloN(), 3)


def test_what_is_kept_is_counted_once_without_parameters():
    block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Sigmoid())
    net = torch.nn.Sequential(block, torch.nn.Conv2d(8, 4, 1)).to("meta")
    image, middle = 3 * 16 * 16 * 4, 8 * 16 * 16 * 4
    # The first convolution keeps the image; the sigmoid its result, which the second reads too.
    assert kept_bytes(net, 16) == image + middle


def test_what_is_kept_grows_with_the_area(model):
    assert kept_bytes(model, 128) == pytest.approx(4 * kept_bytes(model, 64), rel=0.05)


def test_the_estimate_is_near_what_training_takes():
    """Of the activations alone: weights, gradients and workspaces are the same at any batch."""
    net = build_model(YoloN(norm="batch"), 3).train()
    side, kept = 128, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.rand(4, 3, side, side))
    owned = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    real = sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in owned)
    with torch.device("meta"):
        estimate = kept_bytes(build_model(YoloN(), 3), side)
    assert 4 * estimate == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "batch"),
    [
        ({}, 128),  # all the memory in the world: more saves no time
        ({"device": "cpu"}, 16),
        ({"images": 205}, 16),  # an epoch keeps twelve steps
        ({"images": 5}, 1),
        ({"processes": 4}, 512),
        ({"processes": 4, "images": 205}, 16),
        ({"free": 0}, 1),  # nothing fits: the smallest, and the error of the step that fails
    ],
)
def test_the_batch_fits_and_is_worth_it(model, changes, batch):
    assert fitting_batch(model, 64, replace(ROOM, **changes)) == batch


def test_less_memory_means_a_smaller_batch_unless_it_is_cut_or_halved(model):
    each = kept_bytes(model, 320)
    room = replace(ROOM, free=int(20 * each))
    assert fitting_batch(model, 320, room) == 8  # 12 images and the model's own state
    assert fitting_batch(model, 320, replace(room, width=2)) == 16
    assert fitting_batch(model, 320, replace(room, accumulate=4)) == 32


@pytest.mark.parametrize(
    ("batch", "parts", "side", "images"),
    [
        (16, 1, 640, 16),
        (16, 3, 640, 6),  # the largest part
        (512, 1, 32, 512),
        (1024, 1, 640, 64),  # of eight GPUs, say: one does not get all of it
        (1024, 1, 1280, 16),
        (8, 1, 8192, 1),
    ],
)
def test_a_process_does_not_score_the_batch_of_all_at_once(batch, parts, side, images):
    assert scored_at_once(batch, parts, side) == images
