"""Where a pipeline's stages begin: what is measured of blocks, and what is made of it."""

import pytest
import torch
from torch import nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.recipe import Run
from visiontrain.staging import bubble, cheapest, table, within
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
    mib = 2**20
    return BlockCost(name, forward, back, mib, mib, 0, mib, mib, passed, passed)


def test_uneven_stages_wait_longer():
    even, uneven = ([cost(a), cost(b)] for a, b in ((1.0, 1.0), (0.5, 1.5)))
    assert bubble(even, [0, 1], "gpipe", 8) == pytest.approx(1 / 9)
    assert bubble(uneven, [0, 1], "gpipe", 8) > bubble(even, [0, 1], "gpipe", 8)


def test_the_slowest_stage_is_as_fast_as_can_be_and_sends_little():
    costs = [cost(t, passed=p) for t, p in ((3.0, 9), (0.0, 1), (1.0, 9), (2.0, 9))]
    assert cheapest(costs, 2) == [0, 2]  # before block 2: what block 1 passes is least


def test_no_stage_has_more_than_fits():
    costs = [cost(1.0) for _ in range(4)]
    assert cheapest(costs, 2) == [0, 2]
    assert cheapest(costs, 2, lambda stage, begin, end: stage > 0 or end <= 1) == [0, 1]
    assert cheapest(costs, 2, lambda stage, begin, end: end - begin < 2) is None


def test_memory_moves_the_cut_or_is_too_little():
    # Each block: 5 MiB of weights, average, gradient and moments, and 1 for each of 4 batches.
    costs = [cost(t) for t in (3.0, 1.0, 1.0, 1.0)]

    def first(mib):
        strategy = {"kind": "pipeline", "memory": mib / 1024}
        return within(Run(optim={"kind": "adamw"}, strategy=strategy), costs, 4, 1.0)

    assert first(27) == [0, 1]
    assert first(26) == [0, 2]
    with pytest.raises(ConfigError, match=r"^strategy.memory: 0.0166016; no 2 stages "):
        first(17)


def test_the_table_says_what_each_stage_costs():
    costs = [cost(0.5, name="a", passed=2**20), cost(0.25, name="b"), cost(0.25, name="c")]
    assert table(costs, [0, 1], 2.0) == [
        "stage 0: a, 3 s, weights 1.0 MiB, keeps 2 MiB, sends 2.0 MiB",
        "stage 1: b to c, 3 s, weights 2.0 MiB, keeps 4 MiB",
    ]
