"""Where a pipeline's stages begin: what is measured of blocks, and what is made of it."""

import pytest
import torch
from torch import nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.staging import cheapest, refuse_larger, table, within
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.forecast import Facts, flow_of, pipeline
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


def test_a_block_may_read_the_same_twice():
    model = Three().eval()
    model.blocks["head"].decide = nn.Linear(128, 2)
    model.inputs = {**model.inputs, "head": ("wide", "wide")}
    assert model(torch.rand(1, 3, 8, 8)).shape == (1, 2)


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


def facts(costs, images=1, **changes):
    """Of AdamW and 4 micro-batches of `images` images, measured on one; no loss, no pixels."""
    keys = {"average": True, "recompute": False, "batch": 4 * images, "accumulate": 4} | changes
    return Facts(costs, images=1, loss=0, image=0, states=2.0, **keys)


def test_uneven_stages_wait_longer():
    even, uneven = (facts([cost(a), cost(b)]) for a, b in ((1.0, 1.0), (0.5, 1.5)))
    assert pipeline(even, 2, "gpipe", [0, 1]).bubble == pytest.approx(1 / 5)
    assert pipeline(uneven, 2, "gpipe", [0, 1]).bubble > 0.3


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
    costs = [cost(t, passed=0) for t in (3.0, 1.0, 1.0, 1.0)]

    def first(mib, **changes):
        config = Pipeline(memory=mib / 1024, schedule=changes.pop("schedule", "gpipe"))
        return within(config, facts(costs, **changes), 2)

    assert first(27) == [0, 1]
    assert first(26) == [0, 2]
    with pytest.raises(ConfigError, match=r"^strategy.memory: 0.0166016; no 2 stages "):
        first(17)
    assert first(17, schedule="1f1b") == [0, 2]  # fewer micro-batches at once
    assert first(26, average=False) == [0, 1]


def test_stages_that_were_named_are_held_to_the_memory_too():
    costs = [cost(1.0, name=name, passed=0) for name in "abcd"]
    refuse_larger(Pipeline(memory=27 / 1024), facts(costs), 2, [0, 1])
    with pytest.raises(ConfigError, match=r"^strategy.memory: .*; stage 1, from b, needs more"):
        refuse_larger(Pipeline(memory=26 / 1024), facts(costs), 2, [0, 1])


def test_the_table_says_what_each_stage_costs():
    costs = [cost(0.5, name="a", passed=2**20), cost(0.25, name="b"), cost(0.25, name="c")]
    known = facts(costs, images=2)
    assert table(known, flow_of(known, "gpipe", 2, 1, sharded=False), [0, 1]) == [
        "stage 0: a, 3 s, weights 1.0 MiB, keeps 2 MiB, sends 2.0 MiB",
        "stage 1: b to c, 3 s, weights 2.0 MiB, keeps 4 MiB",
    ]
