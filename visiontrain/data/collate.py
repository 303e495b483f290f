"""From samples to a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from visiontrain.core.types import Batch, Item


def collate(samples: Sequence[Item], side: int) -> Batch:
    """Stack samples; targets are padded with class -1. None at all become one empty image."""
    if not samples:
        blank = np.zeros((side, side, 3), np.uint8)
        frame = np.array([1, 0, 0, side, side], np.float32)
        empty = Item(blank, np.zeros((0, 6), np.float32), frame, -1)
        return _stack([empty], valid=0.0)
    return _stack(samples, valid=1.0)


def _stack(samples: Sequence[Item], *, valid: float) -> Batch:
    most = max(1, *(len(sample.targets) for sample in samples))
    targets = torch.zeros(len(samples), most, 6)
    targets[..., 0] = -1
    for row, sample in zip(targets, samples, strict=True):
        row[: len(sample.targets)] = torch.from_numpy(sample.targets)
    return Batch(
        # A view: channels stay last in memory, where `Batch.to` wants them.
        images=torch.from_numpy(np.stack([s.image for s in samples])).permute(0, 3, 1, 2),
        targets=targets,
        ids=torch.tensor([sample.id for sample in samples]),
        frame=torch.from_numpy(np.stack([sample.frame for sample in samples])),
        valid=torch.full((len(samples),), valid),
    )
