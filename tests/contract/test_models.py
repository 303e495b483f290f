"""Every registered model: cut before every block, state, types, gradients."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from visiontrain.core.interfaces import IMAGE
from visiontrain.core.own import Own
from visiontrain.models.config import ModelConfig, YoloN
from visiontrain.models.registry import CLASSIFIERS, MODELS, build_model

CLASSES = 3
BACKBONES = ("tf_efficientnet_lite0", "resnet18", "convnext_atto", "vit_tiny_patch16_224")


def own_detector(classes):
    """As a user would: a detector with blocks."""
    return build_model(YoloN(norm="group"), classes)


def own_net(classes):
    """As a user would: a torch module."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


VARIANTS = [
    *({"kind": kind} for kind in sorted(set(MODELS) - {"object"})),
    {"kind": "object", "own": Own("of:detectors", own_detector)},
    {"kind": "yolo_n", "head": "nms"},
    {"kind": "yolo_n", "finest": 4},
    *({"kind": "yolo_n", "backbone": name, "norm": "frozen"} for name in BACKBONES),
    {"kind": "yolo_n", "backbone": "swin_tiny_patch4_window7_224", "finest": 4},
    {"kind": "yolo_n", "backbone": "convnext_atto", "finest": 4},
    {"kind": "yolo_n", "backbone": "regnetx_002"},  # a family that is not taken apart
]
SORTERS = [
    *({"task": "classify", "kind": kind} for kind in sorted(set(CLASSIFIERS) - {"timm", "object"})),
    {"task": "classify", "kind": "object", "own": Own("of:classifiers", own_net)},
    *(
        {"task": "classify", "kind": "timm", "backbone": name, "norm": "frozen"}
        for name in (*BACKBONES, "mobilenetv3_small_050", "regnetx_002")
    ),
]


def make(config, norm="group"):
    torch.manual_seed(0)
    task = config.get("task", "detect")
    keys = {key: value for key, value in config.items() if key != "task"}
    keys = keys if "own" in keys else {"norm": norm} | keys
    return build_model(TypeAdapter(ModelConfig).validate_python(keys), CLASSES, task)


@pytest.fixture(params=VARIANTS + SORTERS, ids=lambda config: "-".join(map(str, config.values())))
def model(request):
    return make(request.param, "batch" if "backbone" in request.param else "group").train()


def given(model, count):
    """Return what a model reads in training beside its images; the last image has no box."""
    rows = torch.tensor([1.0, 10, 10, 40, 40, 1]).repeat(count, 1, 1)
    rows[-1, :, 0] = -1
    fields = {"targets": rows, "valid": torch.ones(count)}
    return {name: fields[name] for name in model.reads}


def train(model, count):
    return model(torch.rand(count, 3, 64, 64), **given(model, count))


@pytest.fixture
def dual(model):
    if not any(".o2o." in name for name, _ in model.named_parameters()):
        pytest.skip("has no one-to-one branch")
    return model


def test_cut_before_every_block_gives_the_same_outputs(model):
    if len(model.blocks) == 1:
        pytest.skip("is one block")
    images = torch.rand(1, 3, 64, 64)
    model.eval()  # nothing is dropped at random
    want, names = model(images), list(model.blocks)
    for n in range(1, len(names)):
        live = model.live(n)
        first = model.run(names[:n], {IMAGE: images}, keep=live)
        (got,) = model.run(names[n:], dict(zip(live, first, strict=True)), keep=names[-1:])
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_inputs_name_the_image_or_earlier_blocks(model):
    names = list(model.blocks)
    assert list(model.inputs) == names
    for i, name in enumerate(names):
        assert set(model.inputs[name]) <= {IMAGE, *model.reads, *names[:i]}


def test_blocks_never_write_to_their_inputs(model):
    values = {IMAGE: torch.rand(2, 3, 64, 64), **given(model, 2)}
    for name, block in model.blocks.items():
        read = [values[source] for source in model.inputs[name]]
        before = [value.clone() for value in read]
        values[name] = block(*read)
        assert all(torch.equal(a, b) for a, b in zip(before, read, strict=True)), name


def test_every_parameter_is_trained(model):
    """Also by a step without a box: DDP waits for a gradient of each."""
    sum(o.sum() for o in train(model, 1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
@pytest.mark.parametrize("kind", sorted(set(MODELS) - {"object"}))
def test_every_norm_trains_under_the_same_convolution_names(kind, norm):
    other = make({"kind": kind}, norm)
    sum(o.sum() for o in train(other, 2)).backward()
    assert all(p.grad is not None for p in other.parameters())

    def weights(model):  # of all but norms; those of a ResNet have other names
        return {n for n, p in model.named_parameters() if "norm" not in n and p.ndim > 1}

    assert weights(other) == weights(make({"kind": kind}))


def test_the_one_to_one_head_does_not_train_the_body(dual):
    outputs = dual(torch.rand(1, 3, 64, 64))
    outputs[-1].sum().backward()
    trained = {name for name, p in dual.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in dual.named_parameters() if ".o2o." in name}


def test_the_one_to_one_head_keeps_the_best_score_and_lowers_others(dual):
    _, many, one = dual(torch.rand(2, 3, 64, 64))
    assert (one <= many).all()
    best = many.flatten(1).argmax(1, keepdim=True)
    assert torch.equal(one.flatten(1).gather(1, best), many.flatten(1).gather(1, best))
    assert (one < many).flatten(1).any(1).all()


def test_state_round_trip(model):
    images = torch.rand(1, 3, 64, 64)
    model.eval()
    want = model(images)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(model(images), want, strict=True))
