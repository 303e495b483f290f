"""The small residual net: what its settings make of it."""

import pytest
import torch

from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError
from visiontrain.models.config import ResNetTiny
from visiontrain.models.registry import build_model

WIDTHS = [4, 6, 8]


def net(depth):
    torch.manual_seed(0)
    return build_model(ResNetTiny(widths=WIDTHS, depth=depth), 5, "classify").eval()


def test_deeper_stages_add_to_what_shallower_ones_give():
    """With scales of zero, the added convolutions change nothing."""
    shallow, deep = net(2), net(4)
    added = set(deep.state_dict()) - set(shallow.state_dict())
    assert sum(name.endswith("conv.weight") for name in added) == 2 * len(WIDTHS)
    assert not deep.load_state_dict(shallow.state_dict(), strict=False).unexpected_keys
    pictures = torch.rand(2, 3, 32, 32)
    assert not torch.allclose(deep(pictures), shallow(pictures))
    for name, parameter in deep.named_parameters():
        if name in added and name.endswith("norm.weight"):
            parameter.data.zero_()
    torch.testing.assert_close(deep(pictures), shallow(pictures))


def test_weights_keep_their_names():
    """Files of a run from before there was a depth hold these."""
    names = {name for name, _ in net(2).named_parameters()}
    parts = ("enter.weight", "enter_norm.weight", "enter_norm.bias")
    parts += ("stay.weight", "stay_norm.weight", "stay_norm.bias")
    stages = {f"blocks.stage{k}.{part}" for k in (1, 2, 3) for part in parts}
    assert names == stages | {"blocks.head.decide.weight"}


def test_a_stage_has_two_convolutions_at_least():
    with pytest.raises(ConfigError, match=r"depth: 1; .*2"):
        build(ResNetTiny, {"depth": 1})
