"""Detector: a trained model, ready to find objects in pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from visiontrain.core.interfaces import Task, VisionModel
from visiontrain.core.types import Batch, Detections
from visiontrain.data.letterbox import letterbox
from visiontrain.engine.pictures import Picture, Pixels, batches


@dataclass(frozen=True, slots=True)
class Detector:
    """A model with its task and class names, on one device."""

    kind: str  # of the task, such as "detect"
    model: VisionModel
    task: Task
    names: tuple[str, ...]  # a detection's class indexes this
    imgsz: int  # side of the square input, pixels
    device: torch.device

    def predict(self, images: Picture | Sequence[Picture], *, batch: int = 8) -> list[Detections]:
        """Find objects, `batch` pictures at a time.

        Args:
            images: a path, an RGB array (H, W, 3) uint8, or a sequence of either.
            batch: pictures per forward pass.

        Returns:
            One entry per picture, on the CPU, boxes in the picture's own pixels.

        Raises:
            DataError: when a file can't be read or an array has another shape or type.
        """
        return [found for part in batches(images, batch) for found in self.detect(part)]

    @torch.inference_mode()
    def detect(self, images: Sequence[Pixels]) -> list[Detections]:
        """Find objects in `images` by one forward pass."""
        batch = self._batch(images).to(self.device)
        found = self.task.decode(self.model(batch.images), batch)
        return [self._named(objects) for objects in found if isinstance(objects, Detections)]

    def _batch(self, images: Sequence[Pixels]) -> Batch:
        boxed = [letterbox(image, self.imgsz) for image in images]
        squares = np.stack([square for square, _ in boxed])  # (B, S, S, 3)
        count = len(images)
        return Batch(
            images=torch.from_numpy(squares).permute(0, 3, 1, 2),
            targets=torch.full((count, 0, 6), -1.0),
            ids=torch.arange(count),
            frame=torch.from_numpy(np.stack([frame for _, frame in boxed])),
            valid=torch.ones(count),
        )

    def _named(self, found: Detections) -> Detections:
        classes = found.classes.cpu()
        names = tuple(self.names[k] for k in classes.tolist())
        return replace(
            found, boxes=found.boxes.cpu(), scores=found.scores.cpu(), classes=classes, names=names
        )
