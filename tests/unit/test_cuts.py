"""Where pipelines cut: as evenly as brute force finds, for any number of blocks."""

import itertools
import time

import pytest
import torch

from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.strategies.cuts import block_costs, counted


def meta(**keys):
    with torch.device("meta"):
        return build_model(YoloN(**keys), 10)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 10])
def test_the_dearest_stage_is_as_cheap_as_can_be(stages):
    model = meta()
    costs, names = block_costs(model), list(model.blocks)

    def badness(starts):
        bounds = [*starts, len(costs)]
        dearest = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
        return dearest, sum(len(model.live(cut)) for cut in starts[1:])

    best = min(
        badness([0, *inner]) for inner in itertools.combinations(range(1, len(names)), stages - 1)
    )
    found = counted(model, stages)
    assert len(found) == stages
    assert badness(found) == best


def test_many_blocks_are_cut_in_no_time():
    began = time.process_time()
    assert len(counted(meta(backbone="resnet152"), 8)) == 8
    assert time.process_time() - began < 20


def test_equal_blocks_cost_the_same_wherever_channels_are():
    model = meta(backbone="swin_tiny_patch4_window7_224")
    costs = dict(zip(model.blocks, block_costs(model), strict=True))
    of_a_stage = [costs[f"stage2_{i}"] for i in range(6)]
    assert max(of_a_stage) == min(of_a_stage) > 0
    # A block's multiply-adds stay nearly equal from stage to stage: half the side, twice as wide.
    assert costs["stage3_0"] < 2 * costs["stage1_0"] < 8 * costs["stage3_0"]
