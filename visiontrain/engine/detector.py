"""Detector: a trained model, ready to find objects in pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from visiontrain.core.interfaces import Task, VisionModel
from visiontrain.core.types import Batch, Detections
from visiontrain.data.letterbox import letterbox
from visiontrain.engine.evaluate import refuse_nonfinite, whole
from visiontrain.engine.pictures import MAX_PIXELS, Picture, Pixels, batches
from visiontrain.metrics.rows import BOX, CLASS, SCORE, to_rows
from visiontrain.ops.tiles import Tiling, merge_rows

NOTHING = Detections(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, slots=True)
class Detector:
    """A model with its task and class names, on one device or as one stage of a pipeline."""

    kind: str  # of the task, such as "detect"
    model: VisionModel
    task: Task
    names: tuple[str, ...]  # a detection's class indexes this
    imgsz: int  # side of the square input, pixels
    device: torch.device
    tiling: Tiling | None = None  # how pictures are cut
    most: int = 300  # detections kept of a picture that is cut
    least: float = 0.0  # score from which those of tiles are put together, if there are any
    max_pixels: int = MAX_PIXELS  # of a file; larger ones are refused
    # Gives the model's outputs on a placed batch; None where another process has them.
    forward: Callable[[VisionModel, Batch], Any] = whole

    def predict(self, images: Picture | Iterable[Picture], *, batch: int = 8) -> list[Detections]:
        """Find objects, `batch` pictures at a time.

        Args:
            images: a path, an RGB array (H, W, 3) uint8, a picture of PIL's, or several of these.
            batch: pictures per forward pass.

        Returns:
            One entry per picture, on the CPU, boxes in the picture's own pixels.

        Raises:
            DataError: when a file can't be read or an array has another shape or type.
            ConfigError: `batch` is below 1.
        """
        return [
            found
            for part in batches(images, batch, self.max_pixels)
            for found in self.detect(part, batch)
        ]

    def detect(self, images: Sequence[Pixels], batch: int = 8) -> list[Detections]:
        """Find objects in `images` by one forward pass, or one of each `batch` tiles.

        Nothing on a process that holds no outputs. All of a pipeline have to call this alike.
        """
        if self.tiling is None:
            return self._look(images)
        return [self._in_tiles(image, self.tiling, batch) for image in images]

    def _in_tiles(self, image: Pixels, tiling: Tiling, batch: int) -> Detections:
        rects = tiling.rects(image.shape[1], image.shape[0])
        found: list[Detections] = []
        for start in range(0, len(rects), batch):
            some = rects[start : start + batch].tolist()
            found += self._look([image[y1:y2, x1:x2] for x1, y1, x2, y2 in some])
        rows = to_rows(found, torch.arange(len(rects))).numpy()
        likely = rows[rows[:, SCORE] >= self.least]
        whole = merge_rows(
            likely if len(likely) else rows,
            np.zeros(len(rects), np.int64),
            rects.astype(np.float64),
            self.most,
        )
        table = torch.from_numpy(whole).float()
        merged = Detections(table[:, BOX], table[:, SCORE], table[:, CLASS].long())
        return self._named(merged)

    @torch.inference_mode()
    def _look(self, images: Sequence[Pixels]) -> list[Detections]:
        """Find objects in pictures by one forward pass."""
        batch = self._batch(images).to(self.device)
        outputs = self.forward(self.model, batch)
        if outputs is None:
            return [NOTHING] * len(images)
        found = self.task.decode(outputs, batch)
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
        refuse_nonfinite(found.scores, found.boxes)
        classes = found.classes.cpu()
        names = tuple(self.names[k] for k in classes.tolist())
        return replace(
            found, boxes=found.boxes.cpu(), scores=found.scores.cpu(), classes=classes, names=names
        )
