"""MODELS: every network by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import VisionModel
from visiontrain.models.body import own_body, strides_from
from visiontrain.models.classifier import Classifier, resnet_tiny, yolo_classifier
from visiontrain.models.config import (
    ClassifierConfig,
    ModelConfig,
    OwnModel,
    ResNetTiny,
    Timm,
    TorchvisionConfig,
    YoloConfig,
)
from visiontrain.models.yolo import SIZES, Yolo


def yolo(config: YoloConfig, num_classes: int) -> VisionModel:
    """Make a detector of our own family, on its own stages or on a backbone of timm's."""
    size = SIZES[config.kind]
    join: dict[str, Any] = {
        "size": size,
        "classes": num_classes,
        "norm": config.norm,
        "finest": config.finest,
        "dual": config.head == "dual",
    }
    if config.backbone is None:
        return Yolo(own_body(size, config.norm), **join)
    from visiontrain.models.backbones import create, timm_body  # noqa: PLC0415 - seconds

    body = timm_body(create(config.backbone), config.norm)
    if body is not None:
        return Yolo(body, **join)
    from visiontrain.models.uncut import features_of, uncut  # noqa: PLC0415

    return uncut(features_of(config.backbone), **join)


def foreign(config: TorchvisionConfig, num_classes: int) -> VisionModel:
    """Make a detector of torchvision's."""
    from visiontrain.models.torchvision_detectors import build_foreign  # noqa: PLC0415 - a second

    return build_foreign(config, num_classes)


def on_yolo(config: YoloConfig, num_classes: int) -> VisionModel:
    """Make a classifier on the stages of our own detectors."""
    return yolo_classifier(SIZES[config.kind], num_classes, config.norm)


def tiny(config: ResNetTiny, num_classes: int) -> VisionModel:
    """Make a classifier for pictures of 32 pixels."""
    return resnet_tiny(config.widths, config.depth, num_classes, config.norm)


def of_timm(config: Timm, num_classes: int) -> VisionModel:
    """Make a classifier of timm's."""
    from visiontrain.models.timm_classifier import timm_classifier  # noqa: PLC0415 - seconds

    return timm_classifier(config, num_classes)


def own(config: OwnModel, num_classes: int) -> VisionModel:
    """Make a model of the user's.

    Raises:
        ConfigError: it is no model, and no function that makes one.
    """
    given = config.own.value
    if isinstance(given, nn.Module):
        made = deepcopy(given).to(torch.empty(0).device)  # a run may make several, or on `meta`
    elif callable(given):
        made = given(num_classes)
    else:
        made = given
    if isinstance(made, VisionModel):
        return made
    if isinstance(made, nn.Module):
        return Classifier({"model": made})
    raise ConfigError(
        f"model: {config.own.ref} is a {type(made).__name__}; pass a torch module, or a function "
        "that takes the number of classes and returns one"
    )


def own_detector(config: OwnModel, num_classes: int) -> VisionModel:
    """Make a detector of the user's.

    Raises:
        ConfigError: as `own`, or it has no blocks.
    """
    made = own(config, num_classes)
    if isinstance(made, Classifier):
        raise ConfigError(
            f"model: {config.own.ref} is no visiontrain.VisionModel, which a detector has to be; "
            "for a classifier add task=classify"
        )
    return made


Builder = Callable[[Any, int], VisionModel]
MODELS: dict[str, Builder] = {
    **dict.fromkeys(SIZES, yolo),
    "object": own_detector,
    **dict.fromkeys(("fcos", "retinanet", "faster_rcnn"), foreign),
}
CLASSIFIERS: dict[str, Builder] = {
    **dict.fromkeys(SIZES, on_yolo),
    "resnet_tiny": tiny,
    "timm": of_timm,
    "object": own,
}
BUILDERS: Mapping[str, Mapping[str, Builder]] = {"detect": MODELS, "classify": CLASSIFIERS}


def build_model(config: ModelConfig, num_classes: int, task: str = "detect") -> VisionModel:
    """Make the network `config` names. Weights come from torch's generator: seed it first."""
    return BUILDERS[task][config.kind](config, num_classes)


def check_classifier(config: ModelConfig, side: int) -> None:
    """Refuse a classifier that cannot take images of `side` pixels.

    Raises:
        ConfigError: with what the network itself says.
    """
    if not isinstance(config, Timm):
        return
    with torch.device("meta"):  # shapes alone, nothing is computed
        model = build_model(config, 2, "classify")
        try:
            model(torch.empty(2, 3, side, side))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"imgsz: {side}; {config.backbone} does not take that ({first}); take another"
            ) from error


def check_input(config: ModelConfig, side: int, task: str = "detect") -> None:
    """Refuse a backbone that cannot take images of `side` pixels, or gives other maps than it says.

    Raises:
        ConfigError: with what the network itself says.
    """
    if task == "classify" or isinstance(config, ClassifierConfig):
        check_classifier(config, side)
        return
    if isinstance(config, TorchvisionConfig | OwnModel) or config.backbone is None:
        return
    with torch.device("meta"):  # shapes alone, nothing is computed
        model = build_model(config, 1)
        try:
            found = model(torch.empty(2, 3, side, side))[0].shape[1]  # BatchNorm may want two
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise ConfigError(
                f"model.backbone: {config.backbone} does not take {side} px ({first}); take another"
            ) from error
    wanted = sum((-(-side // stride)) ** 2 for stride in strides_from(config.finest))
    if found != wanted:
        raise ConfigError(
            f"model.backbone: {config.backbone} gives maps of other strides than it says; "
            "take another"
        )


def pretrained(config: ModelConfig) -> dict[str, Tensor]:
    """Return the backbone's pretrained tensors by the names they have in the network.

    Raises:
        ConfigError: there are none, or they cannot be downloaded.
        CheckpointError: the file is damaged.
    """
    if isinstance(config, TorchvisionConfig | ResNetTiny | OwnModel) or config.backbone is None:
        return {}
    if config.pretrained == "none":
        return {}
    from visiontrain.models.backbones import create_pretrained, pretrained_tensors  # noqa: PLC0415
    from visiontrain.models.timm_classifier import assembled  # noqa: PLC0415
    from visiontrain.models.uncut import PREFIX, features_of  # noqa: PLC0415 - seconds

    hub = config.pretrained == "hub"
    net = create_pretrained(config.backbone, hub=hub)
    if isinstance(config, Timm):
        return dict(assembled(net, config).state_dict())
    tensors = pretrained_tensors(net, config.norm)
    if tensors:
        return tensors
    if not hub:
        raise ConfigError(
            f"model.pretrained: {config.backbone} is not taken apart, so no package's weights fit; "
            "model.pretrained=hub downloads them"
        )
    whole = features_of(config.backbone, hub=hub).state_dict()
    return {PREFIX + name: value for name, value in whole.items()}


def public(config: ModelConfig) -> tuple[dict[str, Tensor], Sequence[str]] | None:
    """Return the tensors of a whole trained detector and its class names, if any were asked for.

    Raises:
        ConfigError: they cannot be downloaded.
        CheckpointError: the file is damaged.
    """
    if not isinstance(config, TorchvisionConfig) or config.pretrained == "none":
        return None
    from visiontrain.models.torchvision_hub import public_weights  # noqa: PLC0415 - a second

    return public_weights(config)
