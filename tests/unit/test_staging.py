"""Where a pipeline's stages begin: what is measured of blocks, and what is made of it."""

import itertools

import pytest
import torch
from torch import nn

from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.staging import bubble, cheapest, table
from visiontrain.strategies.profile import BlockCost, measure


class Three(VisionModel):
    """A stem, a wide block, and a head that reads both."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict(
            {"stem": nn.Conv2d(3, 4, 1), "wide": nn.Conv2d(4, 64, 3, padding=1), "head": Both()}
        )
        self.inputs = {"stem": (IMAGE,), "wide": ("stem",), "head": ("stem", "wide")}


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.decide = nn.Linear(68, 2)

    def forward(self, first, second):
        return self.decide(torch.cat([first, second], 1).mean((2, 3)))


def test_blocks_are_measured_one_by_one():
    model = Three().train()
    images = torch.rand(2, 3, 32, 32)
    stem, wide, head = measure(model, images)
    pixels = 2 * 32 * 32 * 4  # bytes of one channel of both images
    assert [c.name for c in (stem, wide, head)] == ["stem", "wide", "head"]
    assert stem.parameters == sum(p.nbytes for p in model.blocks["stem"].parameters())
    assert stem.passed == 4 * pixels
    assert wide.passed == (4 + 64) * pixels
    assert head.passed == 2 * 2 * 4  # the logits
    assert (stem.kept, wide.kept) == (4 * pixels, 64 * pixels)  # their outputs, not their inputs
    assert min(c.forward for c in (stem, wide, head)) > 0
    assert min(c.backward for c in (stem, wide, head)) > 0
    assert all(p.grad is None for p in model.parameters())


def test_what_does_not_train_has_no_backward_pass():
    model = Three().train()
    model.freeze(2)
    stem, wide, head = measure(model, torch.rand(2, 3, 16, 16))
    assert stem.backward == wide.backward == 0 < head.backward
    assert stem.kept <= 2 * 4 * 16 * 16 * 4


def cost(forward, backward=None, name="b", passed=1):
    back = 2 * forward if backward is None else backward
    return BlockCost(name, forward, back, 2**20, 2**20, passed)


@pytest.mark.parametrize(("stages", "micro"), [*itertools.product((2, 4), (2, 8, 16))])
def test_equal_stages_wait_as_gpipe_says(stages, micro):
    costs = [cost(1.0) for _ in range(8)]
    first = list(range(0, 8, 8 // stages))
    assert bubble(costs, first, micro) == pytest.approx((stages - 1) / (micro + stages - 1))


def test_uneven_stages_wait_longer():
    even, uneven = ([cost(a), cost(b)] for a, b in ((1.0, 1.0), (0.5, 1.5)))
    assert bubble(uneven, [0, 1], 8) > bubble(even, [0, 1], 8)


def test_the_slowest_stage_is_as_fast_as_can_be_and_sends_little():
    costs = [cost(t, passed=p) for t, p in ((3.0, 9), (0.0, 1), (1.0, 9), (2.0, 9))]
    assert cheapest(costs, 2) == [0, 2]  # before block 2: what block 1 passes is least


def test_the_table_says_what_each_stage_costs():
    costs = [cost(0.5, name="a", passed=2**20), cost(0.25, name="b"), cost(0.25, name="c")]
    assert table(costs, [0, 1], 2.0) == [
        "stage 0: a, 3 s, weights 1.0 MiB, keeps 2 MiB, sends 2.0 MiB",
        "stage 1: b to c, 3 s, weights 2.0 MiB, keeps 4 MiB",
    ]
