"""Where pipelines cut: as evenly as brute force finds, for any number of blocks."""

import itertools
import time

import pytest
import torch

from visiontrain.core.types import Place
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.strategies import config as settings
from visiontrain.strategies.cuts import block_costs, counted, shapes_of
from visiontrain.strategies.live import LiveBytes
from visiontrain.strategies.pipeline import Pipeline
from visiontrain.strategies.precision import Precision


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


def test_shapes_take_no_memory_and_leave_the_model_alone():
    model = build_model(YoloN(), 10).eval()
    before = dict(model.state_dict(keep_vars=True))
    with LiveBytes() as live:
        shapes = shapes_of(model, torch.float64)
    assert live.peak == 0
    assert shapes.training
    assert not model.training
    for name, tensor in shapes.state_dict(keep_vars=True).items():
        same = before.pop(name)
        assert (tensor.device.type, same.device.type) == ("meta", "cpu")
        assert tensor.shape == same.shape
        assert tensor.requires_grad == same.requires_grad
        assert tensor.dtype == (torch.float64 if same.is_floating_point() else same.dtype)
    assert not before


def test_a_stage_places_its_blocks_and_no_others():
    model = build_model(YoloN(), 10)
    blocks = dict(model.blocks.items())
    place, none = Place(torch.device("meta"), rank=1, world=2), torch.device("cpu")
    config = settings.Pipeline(stages=["head"])
    Pipeline(place, Precision("fp32", none), config).setup(model)
    lies = {name: {p.device.type for p in block.parameters()} for name, block in blocks.items()}
    assert lies.pop("head") == {"meta"}
    assert set.union(*lies.values()) == {"cpu"}
    assert {name for name, _ in model.named_parameters()} == {
        f"blocks.head.{name}" for name, _ in blocks["head"].named_parameters()
    }
