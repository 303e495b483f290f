"""A synchronised BatchNorm on a process without an image, as far as a CPU can tell."""

import torch
from torch import nn

from visiontrain.engine.predictor import filled
from visiontrain.engine.weights import Weights, WeightsMeta
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.strategies.base import is_synced
from visiontrain.strategies.handover import on_cpu
from visiontrain.strategies.synced import Joining, join_without_images


class Acting(nn.SyncBatchNorm):
    """As timm's: it does something after."""

    def forward(self, input):
        return super().forward(input).relu()


def test_who_has_no_image_takes_part_in_fp32_and_gives_gradients_of_zero(monkeypatch):
    seen = []

    def forward(self, input):
        seen.append(input.dtype)
        return torch.empty_like(input).detach()  # as torch's: None for all gradients

    monkeypatch.setattr(nn.SyncBatchNorm, "forward", forward)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4), Acting(4)).train()
    join_without_images(model)
    join_without_images(model)  # what is put twice
    assert type(model[1]) is Joining
    assert isinstance(model[2], Joining)
    assert isinstance(model[2], Acting)
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.zeros(0, 3, 2, 2)).dtype == torch.bfloat16
        model(torch.zeros(0, 3, 2, 2)).sum().backward()
    assert seen == [torch.float32, torch.float32]
    assert all((p.grad == 0).all() for p in model.parameters())
    seen.clear()
    model(torch.zeros(2, 3, 2, 2))
    assert seen == [torch.float32] * 2  # as it comes


def test_modules_on_the_cpu_are_handed_over_as_they_are():
    model = nn.Linear(2, 2)
    assert on_cpu(model) is model
    assert on_cpu("text") == "text"


def test_a_module_elsewhere_is_handed_over_as_a_copy_on_the_cpu(monkeypatch):
    model = nn.Linear(2, 2, device="meta")  # as a GPU's, which is not here
    monkeypatch.setattr(nn.Module, "cpu", lambda self: self.to_empty(device="cpu"))
    copied = on_cpu(model)
    assert copied.weight.device.type == "cpu"
    assert model.weight.device.type == "meta"


def test_weights_with_synchronised_norms_are_used_without_a_gpu():
    """In use they normalise by what they learned, as plain ones do."""
    config = YoloN(norm="sync")
    tensors = build_model(config, 2).state_dict()
    meta = WeightsMeta("detect", config.model_dump(mode="json"), ["cat", "dog"], 64)
    model = filled(Weights(meta, tensors), "weights")
    assert not is_synced(model)
    model.eval()(torch.rand(1, 3, 64, 64))
