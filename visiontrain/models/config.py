"""Settings of the models (imports no torch)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.core.own import Own

Norm = Literal["batch", "sync", "group", "frozen"]


class Yolo(Section):
    """What the detectors of our own family share."""

    norm: Norm = Field("batch", description="normalisation: batch, sync (GPUs), group or frozen")
    head: Literal["dual", "nms"] = Field(
        "dual", description="dual needs no suppression in use; nms leaves the one-to-one branch out"
    )
    finest: Literal[4, 8] = Field(
        8, description="stride of the finest level; 4 finds smaller objects and costs time"
    )
    backbone: str | None = Field(
        None, description="a timm model in the place of our own stages, such as resnet50"
    )
    pretrained: Literal["installed", "hub", "none"] = Field(
        "installed",
        description="weights of the backbone: installed, hub (downloads) or none; "
        "torchvision's: hub or none",
    )

    @property
    def suppressed(self) -> bool:
        """Whether its detections always need suppression."""
        return self.head == "nms"


class YoloN(Yolo):
    """The nano detector: 2.0 million parameters, 4.6 GFLOPs at 640 pixels."""

    kind: Literal["yolo_n"] = "yolo_n"


class YoloS(Yolo):
    """The small detector: 7.7 million parameters, 17.6 GFLOPs."""

    kind: Literal["yolo_s"] = "yolo_s"


class YoloM(Yolo):
    """The medium detector: 17.8 million parameters, 58 GFLOPs."""

    kind: Literal["yolo_m"] = "yolo_m"


class YoloL(Yolo):
    """The large detector: 21.8 million parameters, 73 GFLOPs."""

    kind: Literal["yolo_l"] = "yolo_l"


class YoloX(Yolo):
    """The extra large detector: 49.0 million parameters, 165 GFLOPs."""

    kind: Literal["yolo_x"] = "yolo_x"


class Torchvision(Section):
    """What torchvision's detectors share: ResNet-50 and a feature pyramid, all in one block."""

    norm: Norm = Field("batch", description="normalisation of the ResNet; frozen with pretrained")
    pretrained: Literal["hub", "none"] = Field(
        "none", description="hub: torchvision's weights of COCO, downloaded; or none"
    )
    trainable_layers: int = Field(
        5, ge=0, le=5, description="stages of torchvision's ResNet that train, the last ones first"
    )

    @property
    def suppressed(self) -> bool:
        """Whether its detections always need suppression."""
        return True


class Fcos(Torchvision):
    """torchvision's FCOS: anchor-free, a ResNet-50, 32 million parameters."""

    kind: Literal["fcos"] = "fcos"


class RetinaNet(Torchvision):
    """torchvision's RetinaNet: nine anchors a place, a ResNet-50, 32 million parameters."""

    kind: Literal["retinanet"] = "retinanet"


class FasterRcnn(Torchvision):
    """torchvision's Faster R-CNN: two stages, a ResNet-50, 41 million parameters."""

    kind: Literal["faster_rcnn"] = "faster_rcnn"


class ForClasses(Section):
    """What classifiers share."""

    norm: Norm = Field("batch", description="normalisation: batch, sync (GPUs), group or frozen")

    @property
    def suppressed(self) -> bool:
        """Whether its detections always need suppression: it has none."""
        return False


class ResNetTiny(ForClasses):
    """A classifier for pictures of 32 pixels: three stages, 2 million parameters."""

    kind: Literal["resnet_tiny"] = "resnet_tiny"
    widths: list[int] = Field(
        [64, 256, 256],
        min_length=3,
        max_length=3,
        description="channels of the three stages of resnet_tiny",
    )
    depth: int = Field(2, ge=2, description="convolutions in a stage of resnet_tiny")


class Timm(ForClasses):
    """A classifier of timm's, by its name."""

    kind: Literal["timm"] = "timm"
    backbone: str = Field(
        "resnet18", description="a timm model in the place of our own stages, such as resnet50"
    )
    pretrained: Literal["installed", "hub", "none"] = Field(
        "installed",
        description="weights of the backbone: installed, hub (downloads) or none; "
        "torchvision's: hub or none",
    )


class OwnModel(Section):
    """A model of yours, passed in Python: train(model=...)."""

    kind: Literal["object"] = "object"
    own: Own = Field(description="a model of yours, passed in Python: train(model=...)")
    head: Literal["dual", "nms"] = Field(
        "dual", description="dual needs no suppression in use; nms leaves the one-to-one branch out"
    )
    finest: Literal[4, 8] = Field(
        8, description="stride of the finest level; 4 finds smaller objects and costs time"
    )

    @property
    def suppressed(self) -> bool:
        """Whether its detections always need suppression."""
        return self.head == "nms"


YoloConfig = YoloN | YoloS | YoloM | YoloL | YoloX
TorchvisionConfig = Fcos | RetinaNet | FasterRcnn
ClassifierConfig = ResNetTiny | Timm
ModelConfig = Annotated[
    YoloConfig | TorchvisionConfig | ClassifierConfig | OwnModel, Field(discriminator="kind")
]
