"""Bytes of tensors that are alive."""

import torch
from torch import nn

from visiontrain.strategies.live import LiveBytes

KIB = 1024


def test_what_is_alive_is_counted_once_and_no_longer():
    with LiveBytes() as live:
        one = torch.zeros(KIB)
        assert live.now == 4 * KIB
        view = one.view(2, -1)
        live.add([one, view])
        assert live.now == 4 * KIB
        two = one + 1
        del one
        assert live.now == 8 * KIB  # the view holds it
        del view, two
        assert live.now == 0
    assert live.peak == 8 * KIB


def test_a_training_step_leaves_what_it_found():
    model = nn.Sequential(nn.Linear(KIB, KIB, bias=False), nn.ReLU(), nn.Linear(KIB, 4, bias=False))
    images = torch.rand(8, KIB)
    weights = sum(p.nbytes for p in model.parameters())
    with LiveBytes() as live:
        live.add([images, *model.parameters()])
        start = live.now
        assert start == weights + images.nbytes
        model(images).sum().backward()
        assert live.now == start + weights  # gradients
        assert live.peak >= start + weights + 8 * KIB * 4  # beside an activation
        model.zero_grad()
        assert live.now == start


def test_storages_that_are_emptied_and_filled_again_are_followed():
    with LiveBytes() as live:
        gathered = torch.zeros(KIB)
        storage = gathered.untyped_storage()
        storage.resize_(0)
        assert live.now == 0
        storage.resize_(8 * KIB)
        assert live.now == 8 * KIB
    assert live.peak == 8 * KIB
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
