"""ALIASES: the names YOLO users type, and where they lead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

MAIN_FIELD = {"data": "source"}  # what a scalar given to a section sets; `kind` elsewhere
STRATEGY_ALIASES = {"centralized": "single"}


def same(value: Any) -> Any:
    """Pass a value on as it is."""
    return value


def lower(value: Any) -> Any:
    """Accept any capitals: `AdamW`."""
    return value.lower() if isinstance(value, str) else value


def switch(on: str, off: str) -> Callable[[Any], Any]:
    """Return what turns true and false into choices, and leaves the rest."""
    return lambda value: (on if value else off) if isinstance(value, bool) else value


# Keys of YOLO tools that have no counterpart of the same kind here, and what to do instead.
FOREIGN: Mapping[str, str] = {
    "bgr": "there is no such augmentation yet",
    "pretrained": "write model.backbone and model.pretrained, or weights=FILE",
    "exist_ok": "a name that is taken gets a number; out=DIR names a folder",
    "save_period": "a checkpoint is saved every epoch, and the last save.keep stay; leave it out",
    "lr": "write optim.lr",
    "cfg": "name a preset or a YAML file without a key",
    "config": "name a preset or a YAML file without a key",
    "deterministic": "runs repeat to the bit on a CPU anyway",
    "verbose": "log.to=[] shows nothing",
    **dict.fromkeys(("strategies", "runs", "seeds"), "`visiontrain compare` takes it"),
    "half": "training takes precision=fp16; predictions are made in fp32",
    "rect": "images are always padded to squares",
    "nbs": "batch and accumulate are taken as they are",
    "dfl": "boxes are predicted without distributions, so there is no such loss",
    "compile": "it saved no time on CPUs and is not offered yet",
    "dropout": "the models have none",
    "classes": "there is no such filter yet",
    "agnostic_nms": "there is no suppression across classes yet",
    "save_crop": "there is no such output yet",
}

# Values of some of these that say what is so anyway: they are passed over.
SO_ANYWAY: Mapping[str, Any] = {
    **dict.fromkeys(("exist_ok", "half", "rect", "compile", "agnostic_nms", "save_crop"), False),
    **dict.fromkeys(("bgr", "dropout"), 0),
    **{"deterministic": True, "verbose": True, "save_period": -1, "classes": None},
}

ALIASES: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "workers": ("data.workers", same),
    "cache": ("data.cache", switch("ram", "none")),
    "fraction": ("data.fraction", same),
    "single_cls": ("data.single_cls", same),
    "lr0": ("optim.lr", same),
    "lrf": ("optim.lr_final", same),
    "optimizer": ("optim.kind", lower),
    "momentum": ("optim.momentum", same),
    "weight_decay": ("optim.weight_decay", same),
    "warmup_epochs": ("optim.warmup", same),
    "cos_lr": ("optim.schedule", switch("cosine", "linear")),
    "amp": ("precision", switch("auto", "fp32")),
    "conf": ("task.conf", same),
    "iou": ("task.iou", same),
    "max_det": ("task.max_det", same),
    "nms": ("task.nms", same),
    "box": ("task.box", same),
    "cls": ("task.cls", same),
    "plots": ("log.plots", same),
    "close_mosaic": ("augment.close_mosaic", same),
    "mosaic": ("augment.mosaic", same),
    "hsv_h": ("augment.hsv_h", same),
    "hsv_s": ("augment.hsv_s", same),
    "hsv_v": ("augment.hsv_v", same),
    "fliplr": ("augment.fliplr", same),
    "flipud": ("augment.flipud", same),
    "scale": ("augment.scale", same),
    "translate": ("augment.translate", same),
    "degrees": ("augment.degrees", same),
    "shear": ("augment.shear", same),
    "multi_scale": ("augment.multi_scale", same),
    "mixup": ("augment.mixup", same),
    "copy_paste": ("augment.copy_paste", same),
    "cutmix": ("augment.cutmix", same),
    "erasing": ("augment.erasing", same),
    "auto_augment": ("augment.auto", same),
    "label_smoothing": ("task.smoothing", same),
}
