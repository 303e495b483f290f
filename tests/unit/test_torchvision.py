"""torchvision's detectors: its losses as sums, its detections, its weights of COCO by name."""

import dataclasses
import hashlib
import subprocess
import sys
from urllib.error import URLError

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torchvision.models import detection

from visiontrain.core.config import from_keys
from visiontrain.core.errors import CheckpointError, ConfigError
from visiontrain.core.types import Batch, ClassRows
from visiontrain.engine.parity import causes
from visiontrain.engine.weights import start_from
from visiontrain.models import torchvision_hub as hub
from visiontrain.models.config import ModelConfig
from visiontrain.models.registry import build_model
from visiontrain.models.torchvision_detectors import PREFIX
from visiontrain.recipe import Run
from visiontrain.start import class_rows, starting_weights
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.registry import build_task

SIDE, CLASSES = 64, 3
KINDS = ("fcos", "retinanet", "faster_rcnn")
ADDITIVE = KINDS[:2]  # the third draws at random
BUILDERS = {
    "fcos": detection.fcos_resnet50_fpn,
    "retinanet": detection.retinanet_resnet50_fpn,
    "faster_rcnn": detection.fasterrcnn_resnet50_fpn,
}
THEIRS = {  # their names of our terms, in our order
    "fcos": ("classification", "bbox_regression", "bbox_ctrness"),
    "retinanet": ("classification", "bbox_regression"),
    "faster_rcnn": ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"),
}
CPU, FP64 = torch.device("cpu"), torch.float64


def config_of(kind, **keys):
    return TypeAdapter(ModelConfig).validate_python({"kind": kind, **keys})


def ours(kind, norm="group"):
    """Make a model in fp64, and its task."""
    torch.manual_seed(0)
    config = config_of(kind, norm=norm)
    model = build_model(config, CLASSES).double()
    block = model.blocks["detector"]
    quicken(block.net)
    for name in ("mean", "std"):  # torchvision's are not rounded to single first
        exact = torch.tensor(getattr(block.net.transform, f"image_{name}"), dtype=FP64)
        getattr(block.pixels, name).copy_(exact.view(1, 3, 1, 1))
    return model, build_task(DetectConfig(), CLASSES, config)


def quicken(net):
    """Draw fewer proposals: most of the time goes into them."""
    if hasattr(net, "roi_heads"):
        net.roi_heads.fg_bg_sampler.batch_size_per_image = 64
    return net


def reference(kind, model, **keys):
    """Make torchvision's model with the weights of ours; it resizes nothing."""
    background = kind == "faster_rcnn"
    net = BUILDERS[kind](
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES + background,
        min_size=SIDE,
        max_size=SIDE,
        **keys,
    ).double()
    net.load_state_dict(model.blocks["detector"].net.state_dict())
    return quicken(net)


def batch_of(images, seed=0, boxes=3):
    """Make images with random boxes; the last one has none."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, boxes, 2, generator=g) * 30
    size = torch.rand(images, boxes, 2, generator=g) * 30 + 3
    label = torch.randint(0, CLASSES, (images, boxes, 1), generator=g)
    rows = torch.cat([label, corner, corner + size, torch.ones(images, boxes, 1)], -1)
    rows[-1, :, 0] = -1
    frame = torch.tensor([[1.0, 0, 0, SIDE, SIDE]]).repeat(images, 1)
    pixels = torch.rand(images, 3, SIDE, SIDE, generator=g)
    return Batch(pixels, rows, torch.arange(images), frame, torch.ones(images)).to(CPU, FP64)


def part(batch, where):
    return Batch(*(getattr(batch, f.name)[where] for f in dataclasses.fields(batch)))


def loss_of(model, task, batch):
    torch.manual_seed(7)  # Faster R-CNN draws
    given = {name: getattr(batch, name) for name in model.reads}
    return task.loss(model(batch.images, **given), batch, 0.0)


def gradient(model, task, batches):
    model.zero_grad()
    losses = [loss_of(model, task, batch) for batch in batches]
    for loss in losses:
        loss.total().backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()}


# -- the loss -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_counts_are_torchvisions_own_loss(kind):
    model, task = ours(kind, "batch")
    net, batch = reference(kind, model), batch_of(3)
    loss = loss_of(model, task, batch)
    first = int(kind == "faster_rcnn")
    truths = [
        {"boxes": rows[rows[:, 0] >= 0, 1:5], "labels": rows[rows[:, 0] >= 0, 0].long() + first}
        for rows in batch.targets
    ]
    # It draws a size for each image, though there is one; then what follows draws as ours does.
    net.transform.register_forward_hook(lambda *_: torch.manual_seed(7) and None)
    want = net(list(batch.images), truths)
    assert list(loss.terms) == list(task.terms)
    assert loss.counts["all"] > 0
    for name, key in zip(task.terms, THEIRS[kind], strict=True):
        assert want[key] > 0
        # torchvision computes some in single precision even here
        mean = loss.terms[name] / loss.counts["all"]
        torch.testing.assert_close(mean, want[key].to(FP64))


@pytest.mark.parametrize("kind", ADDITIVE)
def test_parts_add_up_to_the_whole(kind):
    model, task = ours(kind)
    batch = batch_of(4)
    (whole,), want = gradient(model, task, [batch])
    parts, got = gradient(model, task, [part(batch, slice(0, 1)), part(batch, slice(1, 4))])
    for name, value in whole.terms.items():
        torch.testing.assert_close(sum(p.terms[name] for p in parts), value)
    torch.testing.assert_close(sum(p.counts["all"] for p in parts), whole.counts["all"])
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_images_that_fill_a_place_add_nothing(kind):
    model, task = ours(kind)
    batch = batch_of(3)
    filled = dataclasses.replace(batch, valid=torch.tensor([1.0, 0.0, 1.0], dtype=FP64))
    want, got = loss_of(model, task, part(batch, [0, 2])), loss_of(model, task, filled)
    for name, value in want.terms.items():
        torch.testing.assert_close(got.terms[name], value)
    assert got.counts == want.counts
    # And alone, they still give every parameter a gradient, for DDP waits for it.
    blank = dataclasses.replace(batch, valid=torch.zeros(3, dtype=FP64))
    (loss,), grads = gradient(model, task, [blank])
    assert loss.total() == loss.counts["all"] == 0
    assert all(not grad.any() for grad in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_without_area_and_batches_without_boxes_train(kind):
    model, task = ours(kind)
    batch = batch_of(2)
    rows = batch.targets.clone()
    rows[0, 1, 3] = rows[0, 1, 1]
    rows[0, 2, 5] = 0  # weighs nothing
    alone = rows.clone()
    alone[0, 1:, 0] = -1
    got = loss_of(model, task, dataclasses.replace(batch, targets=rows))
    want = loss_of(model, task, dataclasses.replace(batch, targets=alone))
    assert {k: v.item() for k, v in got.terms.items()} == {
        k: v.item() for k, v in want.terms.items()
    }
    none = dataclasses.replace(batch, targets=torch.zeros(2, 0, 6, dtype=FP64))
    (loss,), grads = gradient(model, task, [none])
    assert torch.isfinite(loss.total())
    assert all(torch.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_boxes_in_single(kind):
    model, task = ours(kind, "group")
    model.float()
    batch = batch_of(2).to(CPU)
    want = loss_of(model, task, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = loss_of(model, task, batch)
    for name, value in want.terms.items():
        torch.testing.assert_close(got.terms[name], value, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        boxes, scores, _ = model.eval()(batch.images)
    assert boxes.dtype == scores.dtype == torch.float32


def test_parity_says_why_a_draw_is_not_exact():
    (told,) = causes({"model": {"kind": "faster_rcnn", "norm": "frozen"}})
    assert told.startswith("model=faster_rcnn: each process and micro-batch draws its own")
    assert causes({"model": {"kind": "fcos", "norm": "frozen"}}) == []


def test_training_without_targets_is_a_mistake_that_is_told():
    model, _ = ours("fcos")
    with pytest.raises(TypeError, match="need targets"):
        model(torch.zeros(1, 3, SIDE, SIDE, dtype=FP64))


# -- in use ---------------------------------------------------------------------------


def spread(model):
    """Make scores differ, as training would."""
    g = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if any(part in name for part in ("cls_logits", "ctrness", "cls_score", "bbox_")):
            p.data.add_(torch.randn(p.shape, generator=g, dtype=p.dtype), alpha=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_torchvisions_own(kind):
    model, _ = ours(kind, "batch")
    spread(model)
    batch = batch_of(3)
    scores = {"fcos": 0.1, "retinanet": 0.01, "faster_rcnn": 0.05}
    first = int(kind == "faster_rcnn")
    settings = {"score_thresh": scores[kind], "nms_thresh": 0.4, "detections_per_img": 20}
    keys = {f"box_{k}" if kind == "faster_rcnn" else k: v for k, v in settings.items()}
    config = DetectConfig(conf=scores[kind], iou=0.4, max_det=20)
    task = build_task(config, CLASSES, config_of(kind))
    with torch.no_grad():
        found = task.decode(model.eval()(batch.images), batch)
        want = reference(kind, model, **keys).eval()(list(batch.images))
    assert sum(len(f.scores) for f in found) > 10
    for got, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(got.boxes, theirs["boxes"])
        torch.testing.assert_close(got.scores, theirs["scores"])
        assert torch.equal(got.classes, theirs["labels"] - first)


def test_boxes_are_in_original_pixels():
    config = DetectConfig(conf=0.1, iou=0.5, max_det=2)
    task = build_task(config, CLASSES, config_of("fcos"))
    boxes = torch.tensor([[[8.0, 16, 24, 32], [9, 16, 24, 32], [0, 0, 64, 64], [0, 0, 9, 9]]])
    scores, labels = torch.tensor([[0.5, 0.4, 0.9, 0.05]]), torch.tensor([[1, 1, 2, 0]])
    frame = torch.tensor([[0.5, 0.0, 8.0, 100.0, 60.0]])  # scale, pads, original size
    batch = dataclasses.replace(batch_of(1), frame=frame)
    (found,) = task.decode((boxes, scores, labels), batch)
    assert found.boxes.tolist() == [[0, 0, 100, 60], [16, 16, 48, 48]]
    assert found.classes.tolist() == [2, 1]


# -- weights of COCO ------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Return what puts made-up weights where torchvision's would lie; rows carry their number."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def put(kind):
        net = BUILDERS[kind](weights=None, weights_backbone=None, num_classes=91)
        for name, tensor in net.state_dict().items():
            if any(part in name for part in ("cls_logits", "cls_score", "bbox_pred")):
                tensor.copy_(torch.arange(len(tensor)).view(-1, *[1] * (tensor.ndim - 1)))
        folder = tmp_path / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        torch.save(net.state_dict(), folder / "x.pth")
        digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
        path = (folder / "x.pth").rename(folder / f"{kind}-{digest}.pth")
        given = dataclasses.replace(hub.Published.of(kind), url=f"https://none/{path.name}")
        monkeypatch.setattr(hub.Published, "of", lambda _: given)
        return path

    return put


def started(kind, names):
    """Make a model and what it takes from public weights."""
    run = from_keys(Run, {"model": {"kind": kind, "pretrained": "hub", "norm": "frozen"}})
    own = build_model(run.model, len(names)).state_dict()
    return own, start_from(starting_weights(run), own, names, class_rows(run))


NAMES = ["stop sign", "unicorn", "person"]  # rows 13 and 1 of torchvision's
ROW = {"stop sign": 13, "person": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_public_weights_are_taken_and_classes_follow_their_names(kind, published):
    published(kind)
    own, start = started(kind, NAMES)
    assert start.line == (
        f"weights: took {len(own)} of {len(own)} tensors; class rows by name for 2 of 3 classes"
    )
    groups = {"fcos": 1, "retinanet": 9}.get(kind)
    if groups:
        got = start.tensors[f"{PREFIX}head.classification_head.cls_logits.bias"].view(groups, 3)
        assert got[:, 0].tolist() == [91 * g + 13 for g in range(groups)]
        assert got[:, 2].tolist() == [91 * g + 1 for g in range(groups)]
        fresh = own[f"{PREFIX}head.classification_head.cls_logits.bias"].view(groups, 3)
        assert torch.equal(got[:, 1], fresh[:, 1])
        return
    scores = start.tensors[f"{PREFIX}roi_heads.box_predictor.cls_score.bias"]
    boxes = start.tensors[f"{PREFIX}roi_heads.box_predictor.bbox_pred.weight"]
    assert scores[[0, 1, 3]].tolist() == [0, 13, 1]
    assert boxes[:, 0].view(4, 4)[[0, 1, 3]].tolist() == [
        [4 * row + side for side in range(4)] for row in (0, 13, 1)
    ]


def test_damaged_weights_are_told(published):
    path = published("fcos")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"^[^\n]*its sha256 does not begin with [^\n]*$"):
        started("fcos", NAMES)


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch, tmp_path):
    def offline(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "download_url_to_file", offline)
    message = (
        r"^model.pretrained: the weights of fcos cannot be downloaded \([^\n]*no route[^\n]*\); "
        r"put https://[^\n]*fcos_resnet50_fpn_coco-\w+.pth into [^\n]*checkpoints, or [^\n]*none$"
    )
    with pytest.raises(ConfigError, match=message) as caught:
        started("fcos", NAMES)
    assert caught.value.exit_code == 2


def test_pretrained_weights_need_their_norm():
    with pytest.raises(ConfigError, match=r"^model.norm: group, but .* take model.norm=frozen$"):
        build_model(config_of("retinanet", pretrained="hub", norm="group"), CLASSES)


def test_frozen_layers_are_torchvisions():
    model = build_model(config_of("fcos", trainable_layers=2), CLASSES)
    trained = {
        n.split(".")[5] for n, p in model.named_parameters() if p.requires_grad and "body" in n
    }
    assert trained == {"layer3", "layer4"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ours("fcos", "frozen")[0].modules())


def test_rows_of_classes_lie_in_groups():
    rows = ClassRows(groups=2, others=1, each=2)
    assert rows.count(3) == 16
    assert rows.split(torch.arange(16)).tolist() == [
        [[0, 1], [2, 3], [4, 5], [6, 7]],
        [[8, 9], [10, 11], [12, 13], [14, 15]],
    ]


def test_torchvision_is_imported_only_where_it_is_needed():
    asks = (
        "import sys, visiontrain.app, visiontrain.prediction; print('torchvision' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", asks], capture_output=True, check=True, text=True)
    assert told.stdout == "False\n"
