"""Change a sample's colours and mirror it, seeded per sample."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import short
from visiontrain.core.seed import generator, python_random
from visiontrain.data.config import AugmentConfig, ClassifyAugment

# Written, never read: without it albumentations asks the network for its newest version.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

Pixels = NDArray[np.uint8]
PROBE = generator("probe").integers(0, 256, (64, 64, 3), np.uint8)  # a picture
Rows = NDArray[np.float32]  # (M, 6) targets


class Colours:
    """Colour jitter, and what the user named. Every draw depends on the sample's key alone."""

    def __init__(self, config: AugmentConfig | ClassifyAugment) -> None:
        import albumentations as A  # noqa: PLC0415 - seconds to import, not needed to predict

        # Not HueSaturationValue: it adds, which lifts black and colours what is nearly grey.
        self._change: Any = A.Compose(
            [
                A.ColorJitter(
                    hue=(-config.hsv_h, config.hsv_h),
                    saturation=(1 - config.hsv_s, 1 + config.hsv_s),
                    brightness=(1 - config.hsv_v, 1 + config.hsv_v),
                    contrast=(1.0, 1.0),
                    p=1.0,
                ),
                *(custom_transform(entry) for entry in config.custom),
            ]
        )

    def __call__(self, image: Pixels, key: tuple[int | str, ...]) -> Pixels:
        """Return the changed image."""
        # albumentations' own seeding gives every transform the same generator.
        self._change.set_random_state(generator("augment", *key), python_random("augment", *key))
        return self._change(image=image)["image"]


class Augment:
    """Colour jitter and flips. Every draw depends on the sample's key alone."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._colours = Colours(config)

    def __call__(
        self, image: Pixels, rows: Rows, key: tuple[int | str, ...]
    ) -> tuple[Pixels, Rows]:
        """Return the changed image and its targets."""
        image = self._colours(image, key)
        shares = self.config.fliplr, self.config.flipud
        leftright, updown = generator("flip", *key).random(2) < shares
        return flip(image, rows, leftright=bool(leftright), updown=bool(updown))


def custom_transform(entry: Mapping[str, Any]) -> Any:
    """Make one of albumentations' transforms that change pixels and leave boxes where they are.

    Raises:
        ConfigError: there is none of that name, or it does not take these parameters.
    """
    import albumentations as A  # noqa: PLC0415 - seconds

    name, keys = str(entry.get("name")), {k: v for k, v in entry.items() if k != "name"}
    known = {
        kind.__name__: kind
        for kind in vars(A).values()
        if isinstance(kind, type) and issubclass(kind, A.ImageOnlyTransform)
    }
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {close[0]}?" if close else f"such as {', '.join(sorted(known)[:5])}"
        raise ConfigError(f"augment.custom: no image transform {name!r} in albumentations; {meant}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a parameter it does not know is only warned of
            change, always = known[name](**keys), known[name](**{**keys, "p": 1.0})
            changed = always(image=PROBE.copy())["image"]
    except Exception as error:  # whatever it raises: it may ask for more than a picture
        raise ConfigError(
            f"augment.custom: {name}: {short(str(error))}; see albumentations' documentation"
        ) from error
    if changed.dtype != PROBE.dtype or changed.shape != PROBE.shape:
        raise ConfigError(
            f"augment.custom: {name}: turns {PROBE.dtype} {PROBE.shape} into {changed.dtype} "
            f"{changed.shape}; take transforms that leave the type and the shape"
        )
    return change


def flip(image: Pixels, rows: Rows, *, leftright: bool, updown: bool) -> tuple[Pixels, Rows]:
    """Mirror an image and its targets.

    Albumentations could too, but handling boxes costs it 0.5 ms, a fifth of a 160 px sample.
    """
    if not (leftright or updown):
        return image, rows
    height, width = image.shape[:2]
    moved = rows.copy()
    if leftright:
        moved[:, [1, 3]] = width - rows[:, [3, 1]]
    if updown:
        moved[:, [2, 4]] = height - rows[:, [4, 2]]
    code = -1 if leftright and updown else int(leftright)  # OpenCV: 1 left-right, 0 up-down
    return np.asarray(cv2.flip(image, code), np.uint8), moved
