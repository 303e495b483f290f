"""timm's networks as bodies: what they compute, what is refused, weights from a package."""

import hashlib

import pytest
import timm
import torch

from visiontrain.core.errors import CheckpointError, ConfigError
from visiontrain.core.interfaces import IMAGE
from visiontrain.models import pretrained as packages
from visiontrain.models.backbones import create, normalise, timm_body
from visiontrain.models.config import Timm, YoloN
from visiontrain.models.registry import build_model, check_input, pretrained
from visiontrain.models.timm_classifier import assembled

MAPS = (
    *("resnet18", "resnet50d", "seresnet50", "wide_resnet50_2", "efficientnet_b0"),
    *("tf_efficientnet_lite0", "tf_efficientnetv2_s", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "mnasnet_100", "convnext_atto", "convnext_tiny"),
    *("swin_tiny_patch4_window7_224", "swin_s3_tiny_224"),
)
TOKENS = ("vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224")


def values_of(body, images):
    values = {IMAGE: images}
    for name, block in body.blocks.items():
        values[name] = block(*(values[source] for source in body.inputs[name]))
    return {stride: values[level.block] for stride, level in body.levels.items()}


def made(name, side):
    torch.manual_seed(0)
    net, images = create(name).eval(), torch.rand(1, 3, side, side)
    config = net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return net, images, (images - mean) / std


@pytest.mark.parametrize("name", MAPS)
@torch.no_grad()
def test_maps_are_timms_own(name):
    net, images, pixels = made(name, 96)
    want = net.forward_intermediates(pixels, intermediates_only=True)
    want = {96 // m.shape[-1]: m for m in want}  # the last of each stride
    body = timm_body(net, "batch")
    got = values_of(body, images)
    assert sorted(got) == [4, 8, 16, 32]
    for stride, level in body.levels.items():
        assert got[stride].shape[1] == level.channels
        assert torch.equal(got[stride], want[stride]), stride


@pytest.mark.parametrize("name", TOKENS)
@torch.no_grad()
def test_a_transformers_last_map_is_timms_own_at_another_size(name):
    net, images, pixels = made(name, 160)  # trained at 224
    (*_, want) = net.forward_intermediates(pixels, norm=True, intermediates_only=True)
    body = timm_body(net, "batch")
    got = values_of(body, images)
    assert torch.equal(got[16], want)
    sides = {stride: values.shape[-1] for stride, values in got.items()}
    assert sides == {4: 40, 8: 20, 16: 10, 32: 5}
    assert all(got[s].shape[1] == level.channels for s, level in body.levels.items())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"backbone": "resnet5"}, r"^model.backbone: timm has no 'resnet5'; did you mean resnet"),
        (
            {"backbone": "resnet18", "norm": "group"},
            r"^model.norm: group, but .* take model.norm=frozen$",
        ),
        ({"backbone": "resnet18.typo"}, r"^model.backbone: resnet18.typo: Invalid pretrained tag"),
        (
            {"backbone": "vit_base_patch32_224"},
            r"^model.backbone: a transformer of patches",
        ),
        ({"backbone": "vit_tiny_r_s16_p8_224"}, r"^model.backbone: a transformer of patches"),
        ({"backbone": "mixer_s16_224"}, r"^model.backbone: mixer_s16_224 gives no maps of strides"),
    ],
)
def test_what_cannot_be_a_body_is_one_line(keys, message):
    with pytest.raises(ConfigError, match=message):
        build_model(YoloN(**keys), 3)


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "mambaout_femto"])
def test_a_backbone_that_takes_no_such_images_is_one_line(name):
    with pytest.raises(ConfigError, match=rf"^model.backbone: {name} .*; take another$") as caught:
        check_input(YoloN(backbone=name), 320)
    assert "\n" not in str(caught.value)
    check_input(YoloN(backbone="resnet18", finest=4), 320)


def test_a_package_brings_weights_that_timm_computes_with():
    tensors = pretrained(YoloN(backbone="tf_efficientnet_lite0"))
    model = build_model(YoloN(backbone="tf_efficientnet_lite0"), 3)
    assert tensors.keys() <= model.state_dict().keys()
    stem = tensors["blocks.stem.1.0.weight"]
    assert stem.shape == (32, 3, 3, 3)
    # Trained filters: no two alike, and larger ones than any initialisation makes.
    assert stem.abs().max() > 1
    variances = [t for name, t in tensors.items() if name.endswith("running_var")]
    assert all((t >= 0).all() and (t != 1).any() for t in variances)
    means = [t for name, t in tensors.items() if name.endswith("running_mean")]
    assert all((t < 0).any() for t in means)


def test_weights_that_nobody_brings_are_one_line(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match=r"^model.pretrained: no package .* resnet18; .*=hub"):
        pretrained(YoloN(backbone="resnet18"))
    assert pretrained(YoloN(backbone="resnet18", pretrained="none")) == {}
    config = YoloN(backbone="tf_efficientnet_lite0")
    monkeypatch.setattr(packages, "_locate", lambda module, file: None)
    with pytest.raises(ConfigError, match="is not installed; pip install efficientnet-lite0"):
        pretrained(config)
    (tmp_path / "other.pth").write_bytes(b"other")
    monkeypatch.setattr(packages, "_locate", lambda module, file: tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other.pth: its sha256 is not 57934424"):
        pretrained(config)


def test_a_download_that_fails_is_one_line(monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"^model.pretrained: the weights of resnet18 cannot be"):
        pretrained(YoloN(backbone="resnet18", pretrained="hub"))


def test_the_manifest_names_what_is_there():
    for name, entry in packages.known().items():
        path = packages._locate(entry["module"], entry["file"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        assert timm.is_model(name)
        assert {"package", "license"} <= entry.keys()


WHOLE = (
    *("resnet10t", "resnet18", "resnet26", "tf_efficientnet_lite0"),
    *("mobilenetv3_small_050", "mobilenetv3_large_075", "convnext_atto", "convnext_femto"),
    *("swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "deit_tiny_patch16_224"),
    *("regnetx_002", "vit_small_r26_s32_224"),  # not taken apart
)


@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("pool", ["map", "avg"])
def test_registers_are_pooled_only_where_timm_pools_them(pool, with_extra):
    torch.manual_seed(0)
    keys = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    keys |= {"class_token": False, "reg_tokens": 2, "num_classes": 3, "global_pool": pool}
    keys["dynamic_img_size"] = True  # as `create` makes them
    net = timm.models.VisionTransformer(**keys, pool_include_prefix=with_extra).eval()
    net.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        model = assembled(net, Timm()).eval()
        torch.testing.assert_close(model(images), net(normalise(net)(images)))


@pytest.mark.parametrize("name", WHOLE)
def test_a_classifier_computes_what_timm_computes(name):
    torch.manual_seed(0)
    net = create(name, num_classes=7)
    images = torch.rand(1, 3, 224, 224)
    model = assembled(net, Timm(backbone=name)).eval()
    with torch.no_grad():
        want = net.eval()(normalise(net)(images))
        assert torch.equal(model(images), want)
    assert want.shape == (1, 7)
    parameters = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in model.parameters()) == parameters
