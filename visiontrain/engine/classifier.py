"""Classifier: a trained model, ready to name what is in pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from visiontrain.core.interfaces import Task, VisionModel
from visiontrain.core.types import Batch, ClassScores
from visiontrain.data.class_dataset import batch_of
from visiontrain.data.views import centre
from visiontrain.engine.evaluate import refuse_nonfinite, seen, whole
from visiontrain.engine.pictures import MAX_PIXELS, Picture, Pixels, batches


@dataclass(frozen=True, slots=True)
class Classifier:
    """A model with its task and class names, on one device or as one stage of a pipeline."""

    kind: str  # of the task: "classify"
    model: VisionModel
    task: Task
    names: tuple[str, ...]  # a class indexes this
    imgsz: int  # side of the square input, pixels
    device: torch.device
    max_pixels: int = MAX_PIXELS  # of a file; larger ones are refused
    # Gives the model's outputs on a placed batch; None where another process has them.
    forward: Callable[[VisionModel, Batch], Any] = whole

    def predict(self, images: Picture | Iterable[Picture], *, batch: int = 8) -> list[ClassScores]:
        """Score every class, `batch` pictures at a time, each by the square in its middle.

        Args:
            images: a path, an RGB array (H, W, 3) uint8, a picture of PIL's, or several of these.
            batch: pictures per forward pass.

        Returns:
            One entry per picture, on the CPU.

        Raises:
            DataError: when a file can't be read or an array has another shape or type.
            ConfigError: `batch` is below 1.
        """
        return [
            scores
            for part in batches(images, batch, self.max_pixels)
            for scores in self.classify(part)
        ]

    @torch.inference_mode()
    def classify(self, images: Sequence[Pixels]) -> list[ClassScores]:
        """Score every class in `images` by one forward pass for each view of the task.

        None on a process that holds no outputs. All of a pipeline have to call this alike.
        """
        squares = np.stack([centre(image, self.imgsz) for image in images])
        batch = batch_of(squares, [[]] * len(images), np.arange(len(images))).to(self.device)
        outputs = seen(partial(self.forward, self.model), batch, self.task)
        if outputs is None:
            return [ClassScores(torch.empty(0))] * len(images)
        found = self.task.decode(outputs, batch)
        refuse_nonfinite(*(one.scores for one in found))
        return [
            replace(one, scores=one.scores.cpu(), names=self.names)
            for one in found
            if isinstance(one, ClassScores)
        ]
