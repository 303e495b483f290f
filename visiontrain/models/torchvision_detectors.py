"""torchvision's detectors, each as one block: its network, anchors and losses; sums as ours are.

FCOS (Tian et al. 2019, arXiv 1904.01355), RetinaNet (Lin et al. 2017, 1708.02002) and Faster
R-CNN (Ren et al. 2015, 1506.01497) as in torchvision.models.detection, which is under the BSD
3-clause licence. B images of S x S pixels, M targets, C classes, K candidates.

Importing torchvision takes a second, so this module is imported only where it is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.boxes import clip_boxes_to_image, remove_small_boxes
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel
from visiontrain.core.types import ClassRows
from visiontrain.models.backbones import Normalise
from visiontrain.models.config import Norm, TorchvisionConfig

BLOCK = "detector"
PREFIX = f"blocks.{BLOCK}.net."  # of torchvision's tensors
CHANNELS = 256  # of the pyramid
NORMS: Mapping[Norm, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": lambda channels: nn.GroupNorm(32, channels),
    "frozen": FrozenBatchNorm2d,
}
Truth = dict[str, Tensor]  # of one image, as torchvision names it: boxes (N, 4), labels (N,)


# -- targets ------------------------------------------------------------------------


def chosen(targets: Tensor, valid: Tensor, first: int) -> tuple[Tensor, list[Truth], Tensor]:
    """Return the images that count, what is on them, and their number.

    Where none counts, all are returned, as empty, with the number 0: multiplied by it, their
    losses still reach every parameter.

    Args:
        targets: (B, M, 6) rows of class, x1, y1, x2, y2, weight; class -1 pads.
        valid: (B,) 1, or 0 for an image that only fills a place.
        first: label of the first class.

    Returns:
        Indices (K,), one dict for each of them, and the number () in the type of `targets`.
    """
    real = valid > 0
    count = real.sum().to(targets.dtype)
    index = real.nonzero().flatten()
    if len(index):
        return index, [truth(rows, first) for rows in targets[index]], count
    nothing = [truth(rows[:0], first) for rows in targets]
    return torch.arange(len(valid), device=valid.device), nothing, count


def truth(rows: Tensor, first: int) -> Truth:
    """Take the targets (M, 6) of an image apart; boxes without an area cannot be encoded."""
    sides = rows[:, 3:5] - rows[:, 1:3]
    rows = rows[(rows[:, 0] >= 0) & (rows[:, 5] > 0) & (sides > 0).all(1)]
    return {"boxes": rows[:, 1:5], "labels": rows[:, 0].long() + first}


def listed(images: Tensor) -> ImageList:
    """Name the size of each image (B, 3, S, S), as torchvision wants it."""
    height, width = images.shape[-2:]
    return ImageList(images, [(height, width)] * len(images))


def wide(tensor: Tensor) -> Tensor:
    """Bring half precision to single: boxes and logarithms need it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


# -- one stage ----------------------------------------------------------------------


class CountingHead(FCOSHead):
    """FCOS's head; its losses are sums, and the number of positive anchors comes with them."""

    def compute_loss(
        self,
        targets: list[Truth],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        """Undo torchvision's division by the positives of its batch; see FCOSHead."""
        means = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        count = torch.stack([(index >= 0).sum() for index in matched_idxs]).sum()
        return {name: mean * count.clamp(min=1) for name, mean in means.items()} | {"count": count}


class OneStage(nn.Module):
    """FCOS or RetinaNet: every place of every level says a class and a box."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.pixels = Normalise(net.transform.image_mean, net.transform.image_std)

    def forward(
        self, images: Tensor, targets: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the loss's sums and its count, each (); in use the candidates.

        Candidates are boxes (B, K, 4) in pixels of the input, scores (B, K) and classes (B, K):
        the best thousand of each level, not yet suppressed.
        """
        maps = list(self.net.backbone(self.pixels(images)).values())
        outputs = {name: wide(value) for name, value in self.net.head(maps).items()}
        like = next(iter(outputs.values()))
        # Only shapes and type matter, and half precision would round the anchors.
        shaped = [like.new_empty(()).expand(level.shape) for level in maps]
        anchors = self.net.anchor_generator(listed(images), shaped)
        sizes = [level.shape[-2] * level.shape[-1] * self._per_place() for level in maps]
        with torch.autocast(images.device.type, enabled=False):
            if not self.training:
                return self._candidates(outputs, anchors[0], sizes, images.shape[-2:])
            if targets is None or valid is None:
                raise TypeError("torchvision's detectors need targets and valid in training")
            return self._losses(outputs, anchors, sizes, targets.to(like.dtype), valid)

    def _per_place(self) -> int:
        return self.net.anchor_generator.num_anchors_per_location()[0]

    def _losses(
        self,
        outputs: Mapping[str, Tensor],
        anchors: Sequence[Tensor],
        sizes: Sequence[int],
        targets: Tensor,
        valid: Tensor,
    ) -> tuple[Tensor, ...]:
        """Let torchvision compute its means, and turn them into sums and what divides them."""
        index, truths, number = chosen(targets, valid, first=0)
        kept = {name: value[index] for name, value in outputs.items()}
        if isinstance(self.net, FCOS):  # a mean over all positives
            sums = self.net.compute_loss(truths, kept, list(anchors[: len(index)]), list(sizes))
            count = sums.pop("count").to(number.dtype)
            return *(value * (number > 0) for value in sums.values()), count
        # A mean over images of means over each one's positives.
        means = self.net.compute_loss(truths, kept, list(anchors[: len(index)]))
        return *(value * number for value in means.values()), number

    def _candidates(
        self,
        outputs: Mapping[str, Tensor],
        anchors: Tensor,
        sizes: Sequence[int],
        side: Sequence[int],
    ) -> tuple[Tensor, ...]:
        scores = outputs["cls_logits"].sigmoid()  # (B, A, C)
        if "bbox_ctrness" in outputs:
            scores = (scores * outputs["bbox_ctrness"].sigmoid()).sqrt()
        classes, found = scores.shape[-1], []
        levels = zip(
            scores.split(sizes, 1),
            outputs["bbox_regression"].split(sizes, 1),
            anchors.split(sizes),
            strict=True,
        )
        for score, offsets, places in levels:
            flat = score.flatten(1)
            best, index = flat.topk(min(self.net.topk_candidates, flat.shape[1]))
            where = index // classes  # (B, K)
            moved = offsets.gather(1, where[..., None].expand(-1, -1, 4))
            boxes = self._decode(moved.flatten(0, 1), places[where].flatten(0, 1))
            found.append((boxes.view(moved.shape), best, index % classes))
        boxes, best, labels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return clip_boxes_to_image(boxes, (side[0], side[1])), best, labels

    def _decode(self, offsets: Tensor, anchors: Tensor) -> Tensor:
        coder = self.net.box_coder
        return (getattr(coder, "decode_single", None) or coder.decode)(offsets, anchors)


# -- two stages ---------------------------------------------------------------------


class TwoStage(nn.Module):
    """Faster R-CNN: proposals first, then a class and a box for each of them."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.pixels = Normalise(net.transform.image_mean, net.transform.image_std)
        # torchvision moves boxes in the type of what these say; half precision rounds them.
        for part in (net.rpn.head, net.roi_heads.box_predictor):
            part.register_forward_hook(_widened)

    def forward(
        self, images: Tensor, targets: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the loss's sums and its count, each (); in use the candidates.

        Candidates are boxes (B, K, 4) in pixels of the input, scores (B, K) and classes (B, K):
        every class of up to a thousand proposals, not yet suppressed; a score of -1 fills up.
        """
        maps = self.net.backbone(self.pixels(images))
        maps = {name: wide(value) for name, value in maps.items()}
        if not self.training:
            return self._candidates(images, maps)
        if targets is None or valid is None:
            raise TypeError("torchvision's detectors need targets and valid in training")
        index, truths, number = chosen(wide(targets), valid, first=1)
        maps = {name: value[index] for name, value in maps.items()}
        shapes = listed(images[index])
        proposals, losses = self.net.rpn(shapes, maps, truths)
        _, more = self.net.roi_heads(maps, proposals, shapes.image_sizes, truths)
        # Means over anchors and proposals drawn at random, as many from each image where there
        # are enough: weighted by images they add up but for that.
        return *(value * number for value in (losses | more).values()), number

    def _candidates(self, images: Tensor, maps: dict[str, Tensor]) -> tuple[Tensor, ...]:
        heads, shapes = self.net.roi_heads, listed(images)
        proposals, _ = self.net.rpn(shapes, maps)
        pooled = heads.box_roi_pool(maps, proposals, shapes.image_sizes)
        logits, offsets = heads.box_predictor(heads.box_head(pooled))
        boxes = heads.box_coder.decode(offsets, proposals).view(*logits.shape, 4)[:, 1:]
        boxes = clip_boxes_to_image(boxes, shapes.image_sizes[0])
        scores = logits.softmax(-1)[:, 1:]  # without the background
        labels = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        filled = torch.full_like(scores, -1).flatten()
        some = remove_small_boxes(boxes.flatten(0, 1), min_size=1e-2)
        filled[some] = scores.flatten()[some]
        counts = [len(each) for each in proposals]
        parts = ((boxes, 0), (filled.view(scores.shape), -1), (labels, 0))
        boxes, scores, labels = (_padded(part, counts, fill) for part, fill in parts)
        return boxes, scores, labels


def _widened(_: nn.Module, __: Any, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Bring a module's outputs, tensors or lists of such, to full precision."""
    return tuple(wide(o) if isinstance(o, Tensor) else [wide(each) for each in o] for o in outputs)


def _padded(rows: Tensor, counts: Sequence[int], fill: int) -> Tensor:
    """Turn the rows (P, C, ...) of all images' proposals into (B, K, ...), all as long."""
    each = [part.flatten(0, 1) for part in rows.split(list(counts))]
    return nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=fill)


# -- from a config to a model -------------------------------------------------------


class Foreign(VisionModel):
    """A detector of one block, which needs the targets in training: no pipeline can cut it."""

    reads = ("targets", "valid")
    inputs = {BLOCK: (IMAGE, *reads)}  # noqa: RUF012 - read-only by convention

    def __init__(self, block: nn.Module, class_rows: Mapping[str, ClassRows]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({BLOCK: block})
        self.body = (f"{PREFIX}backbone.body.",)
        self.class_rows = {PREFIX + name: rows for name, rows in class_rows.items()}


def fcos(backbone: nn.Module, classes: int) -> Foreign:
    """Put FCOS's head on a pyramid of strides 8 to 128."""
    return Foreign(OneStage(FCOS(backbone, classes, head=CountingHead(CHANNELS, 1, classes))), {})


def retinanet(backbone: nn.Module, classes: int) -> Foreign:
    """Put RetinaNet's head on a pyramid of strides 8 to 128."""
    net: Any = RetinaNet(backbone, classes)
    anchors = ClassRows(groups=net.anchor_generator.num_anchors_per_location()[0])
    name = "head.classification_head.cls_logits"
    return Foreign(OneStage(net), {f"{name}.weight": anchors, f"{name}.bias": anchors})


def faster_rcnn(backbone: nn.Module, classes: int) -> Foreign:
    """Put Faster R-CNN's two stages on a pyramid of strides 4 to 64; class 0 is background."""
    name, rows = "roi_heads.box_predictor", {}
    for part in ("weight", "bias"):
        rows[f"{name}.cls_score.{part}"] = ClassRows(others=1)
        rows[f"{name}.bbox_pred.{part}"] = ClassRows(others=1, each=4)
    return Foreign(TwoStage(FasterRCNN(backbone, classes + 1)), rows)


HEADS: Mapping[str, Callable[[nn.Module, int], Foreign]] = {
    "fcos": fcos,
    "retinanet": retinanet,
    "faster_rcnn": faster_rcnn,
}


def build_foreign(config: TorchvisionConfig, classes: int) -> Foreign:
    """Make the network `config` names, with random weights.

    Raises:
        ConfigError: pretrained, but without the batch norm that the weights were made with.
    """
    hub = config.pretrained == "hub"
    if hub and config.norm == "group":
        raise ConfigError(
            "model.norm: group, but torchvision's weights were made with batch norm; "
            "take model.norm=frozen"
        )
    single = config.kind != "faster_rcnn"
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50",
        weights=None,
        norm_layer=NORMS[config.norm],
        trainable_layers=config.trainable_layers,
        returned_layers=[2, 3, 4] if single else None,
        extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS) if single else None,
    )
    model = HEADS[config.kind](backbone, classes)
    if hub and config.kind != "fcos":
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d):
                module.eps = 0.0  # as torchvision does with these two sets of weights
    return model
