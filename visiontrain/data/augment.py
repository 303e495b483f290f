"""Change a sample's pixels and flips with albumentations, seeded per sample."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.seed import generator, python_random
from visiontrain.data.config import AugmentConfig

# Written, never read: without it albumentations asks the network for its newest version.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]  # (M, 6) targets


class Augment:
    """Colour jitter and flips. Every draw depends on the sample's key alone."""

    def __init__(self, config: AugmentConfig) -> None:
        import albumentations as A  # noqa: PLC0415 - seconds to import, not needed to predict

        self._compose: Any = A.Compose(
            [
                A.HueSaturationValue(
                    hue_shift_limit=config.hsv_h * 180,
                    sat_shift_limit=config.hsv_s * 100,
                    val_shift_limit=config.hsv_v * 100,
                    p=1.0,
                ),
                A.HorizontalFlip(p=config.fliplr),
                A.VerticalFlip(p=config.flipud),
            ],
            # Boxes travel by index: albumentations turns labels into floats.
            bbox_params=A.BboxParams(
                "pascal_voc", label_fields=["index"], clip=True, filter_invalid_bboxes=True
            ),
        )

    def __call__(
        self, image: Pixels, rows: Rows, key: tuple[int | str, ...]
    ) -> tuple[Pixels, Rows]:
        """Return the changed image and its targets."""
        # albumentations' own seeding gives every transform the same generator.
        self._compose.set_random_state(generator("augment", *key), python_random("augment", *key))
        out = self._compose(image=image, bboxes=rows[:, 1:5], index=np.arange(len(rows)))
        kept = rows[np.asarray(out["index"], np.int64)]
        kept[:, 1:5] = np.asarray(out["bboxes"], np.float32).reshape(-1, 4)
        return out["image"], kept
