"""Settings of the data and of its augmentation (imports no torch)."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from visiontrain.core.config import Section
from visiontrain.core.own import Own
from visiontrain.ops.tiles import Tiling

OWN = "a change of yours to each image before all others, passed in Python: train(augment=...)"


class DataConfig(Section):
    """Which images, and how they are read."""

    source: str = Field(
        "digits",
        description="data set: a name from datasets/, a YAML, a COCO JSON, or a folder: VOC, COCO, "
        "classes or tars",
    )
    train_images: int | None = Field(
        None, ge=1, description="training scenes that digits and tiny compose; a cap elsewhere"
    )
    val_images: int | None = Field(
        None,
        ge=1,
        description="validation scenes that digits and tiny compose; a cap elsewhere",
    )
    fraction: float = Field(1.0, gt=0, le=1, description="share of the training images to use")
    single_cls: bool = Field(False, description="treat all classes as one, named `object`")
    balance: Literal["none", "repeat", "class"] = Field(
        "none",
        description="show images of rare classes more often (repeat), or each class as often "
        "(class)",
    )
    balance_threshold: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = Field(
        "auto",
        description="share of images below which a class is rare to repeat; auto: 1 / number of "
        "classes",
    )
    workers: int | Literal["auto"] = Field(
        "auto", description="loader processes per rank; 0 loads in the training process"
    )
    cache: Literal["none", "ram", "disk"] = Field(
        "none", description="keep decoded images in memory, or in a file outside your data"
    )
    cache_dir: str | None = Field(
        None,
        description="folder of cache=disk, scanned headers and copied tars; default: user cache",
    )
    window: int = Field(
        16, ge=1, description="shards: how many are read at a time, in each a part of the epoch"
    )
    shard_cache_gb: float = Field(
        20.0, gt=0, description="shards at URLs: GB of copies that are kept, the oldest go first"
    )
    strict: bool = Field(False, description="stop at the first bad image or label")
    max_pixels: int = Field(
        64_000_000, ge=1, description="refuse larger images from their header, before decoding"
    )
    tile: int | None = Field(
        None, ge=32, description="cut images into squares of so many pixels, for small objects"
    )
    overlap: float = Field(
        0.2, ge=0, le=0.9, description="overlap of neighbouring tiles, share of the side"
    )
    own: Own | None = Field(
        None, description="data sets of yours, passed in Python: train(data=...)"
    )

    @property
    def tiling(self) -> Tiling | None:
        """How images are cut, if they are."""
        return None if self.tile is None else Tiling.of(self.tile, self.overlap)


class ShardingConfig(Section):
    """A data set, and the tars to write of it."""

    data: DataConfig = DataConfig()
    task: Literal["detect", "classify"] | None = Field(
        None, description="what digits and tiny are written for; elsewhere the labels say it"
    )
    out: str = Field(description="new folder for the tars, outside of the data set's")
    split: list[Literal["train", "val", "test"]] = Field(
        [], description="splits to write; default: all"
    )
    shard_size: float = Field(256.0, gt=0, description="MB per tar, about")
    shuffle: bool = Field(
        True, description="mix the images once, so that every tar has some of everything"
    )


SHARDING_USES = (  # what `visiontrain data shard` may be told
    *(f"data.{name}" for name in ("source", "train_images", "val_images", "fraction")),
    *(f"data.{name}" for name in ("single_cls", "strict", "cache_dir", "max_pixels")),
    *("data.shard_cache_gb", "task", "out", "split", "shard_size", "shuffle"),
)


class AugmentConfig(Section):
    """Mosaics, zoom, shift, flips and colours, all drawn anew for every sample."""

    kind: Literal["standard"] = "standard"
    mosaic: float = Field(1.0, ge=0, le=1, description="share of samples made of four images")
    close_mosaic: int = Field(
        10, ge=0, description="epochs at the end without mosaic, at most half"
    )
    hsv_h: float = Field(0.015, ge=0, le=0.5, description="hue jitter, share of the circle")
    hsv_s: float = Field(0.7, ge=0, le=1, description="saturation jitter, relative")
    hsv_v: float = Field(0.4, ge=0, le=1, description="brightness jitter, relative")
    fliplr: float = Field(0.5, ge=0, le=1, description="probability of a left-right flip")
    flipud: float = Field(0.0, ge=0, le=1, description="probability of an up-down flip")
    scale: float = Field(0.5, ge=0, lt=1, description="zoom between 1 - scale and 1 + scale")
    translate: float = Field(
        0.1, ge=0, le=1, description="shift of single images, share of the side; not of mosaics"
    )
    multi_scale: float = Field(
        0.0, ge=0, le=0.5, description="each step's input side lies this share around imgsz"
    )
    degrees: float = Field(0.0, ge=0, le=180, description="turn between -degrees and degrees")
    shear: float = Field(0.0, ge=0, le=60, description="shear between -shear and shear degrees")
    perspective: float = Field(
        0.0, ge=0, le=0.5, description="tilt: at 0.5 an edge may be 5/3 as long as the one opposite"
    )
    mixup: float = Field(0.0, ge=0, le=1, description="share of samples blended with another")
    copy_paste: float = Field(
        0.0, ge=0, le=1, description="share of samples into which another's objects are pasted"
    )
    custom: list[dict[str, Any]] = Field(
        [],
        description="albumentations' image transforms by name: [{name: Blur, blur_limit: 5}]",
    )
    own: Own | None = Field(None, description=OWN)


def sides(imgsz: int, augment: AugmentConfig | ClassifyAugment | NoAugment) -> range:
    """Return the sides that steps may have, pixels: multiples of 32 in the asked range."""
    spread = augment.multi_scale if isinstance(augment, AugmentConfig) else 0.0
    least, most = math.ceil(imgsz * (1 - spread) / 32), math.floor(imgsz * (1 + spread) / 32)
    return range(32 * least, 32 * most + 1, 32)


class ClassifyAugment(Section):
    """Crops, flips, colours, erased parts and mixtures of whole images, all drawn anew."""

    kind: Literal["classify"] = "classify"
    crop: float = Field(
        0.25, gt=0, le=1, description="least share of the area that a random crop keeps; 1: all"
    )
    translate: float = Field(
        0.0, ge=0, le=0.5, description="shift, share of the side; the border is mirrored"
    )
    fliplr: float = Field(
        0.5, ge=0, le=1, description="probability of a left-right flip; 0.5 flips every other epoch"
    )
    flipud: float = Field(0.0, ge=0, le=1, description="probability of an up-down flip")
    auto: Literal["none", "trivial", "randaugment"] = Field(
        "none", description="changes by policy: one of any strength, or two of medium strength"
    )
    hsv_h: float = Field(0.0, ge=0, le=0.5, description="hue jitter, share of the circle")
    hsv_s: float = Field(0.0, ge=0, le=1, description="saturation jitter, relative")
    hsv_v: float = Field(0.0, ge=0, le=1, description="brightness jitter, relative")
    erasing: float = Field(
        0.0, ge=0, le=1, description="share of samples of which a rectangle is greyed"
    )
    mixup: float = Field(0.0, ge=0, le=1, description="share of samples blended with another")
    cutmix: float = Field(
        0.0, ge=0, le=1, description="share of samples with a rectangle of another"
    )
    custom: list[dict[str, Any]] = Field(
        [],
        description="albumentations' image transforms by name: [{name: Blur, blur_limit: 5}]",
    )
    own: Own | None = Field(None, description=OWN)

    @property
    def keeps_squares(self) -> bool:
        """Whether all starts from the same square of a picture, with no colours of a library."""
        return self.crop == 1 and not (self.coloured or self.custom or self.own is not None)

    @property
    def coloured(self) -> bool:
        """Whether colours are changed."""
        return max(self.hsv_h, self.hsv_s, self.hsv_v) > 0


class NoAugment(Section):
    """Training images as they are."""

    kind: Literal["none"] = "none"
    own: Own | None = Field(None, description=OWN)


AugmentSection = Annotated[AugmentConfig | ClassifyAugment | NoAugment, Field(discriminator="kind")]
