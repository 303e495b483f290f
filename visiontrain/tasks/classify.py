"""Image classification: cross-entropy, or one binary decision for each class.

B images, M targets, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Batch, ClassScores, Loss, Views, moved
from visiontrain.tasks.config import ClassifyConfig

HEAD = "all"  # one count divides the one term
TERM = f"{HEAD}/cls"


@dataclass(frozen=True, slots=True)
class ClassifyTask:
    """Loss and decoding of a classifier with `num_classes` classes."""

    config: ClassifyConfig
    num_classes: int
    heads: tuple[str, ...] = (HEAD,)
    terms: tuple[str, ...] = (TERM,)

    @property
    def views(self) -> Views:
        """How pictures are looked at to be scored."""
        return Views(mirrored=self.config.flip, shift=self.config.shift)

    @property
    def best(self) -> str:
        """The metric that picks the best checkpoint."""
        return "map" if self.config.several else "top1"

    def head_of(self, parameter: str) -> str:
        """Name the head that trains `parameter`: there is one."""
        del parameter
        return HEAD

    def loss(self, outputs: Tensor, batch: Batch, progress: float) -> Loss:
        """Compare logits (B, C) with the classes of `batch`, each by its weight.

        The count is the images', weighted as their classes are (as torch's `cross_entropy` does);
        the smoothing is that of Szegedy et al. 2016 (arXiv 1512.00567).

        Raises:
            ConfigError: the model, one of the user's, gives something else.
        """
        del progress
        self._check(outputs, len(batch))
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        wanted = self._wanted(batch, logits)
        weights = moved(torch.tensor(self._weights(), dtype=logits.dtype), logits.device)
        valid = batch.valid.to(logits.dtype)
        if self.config.several:
            wanted = self._smoothed(wanted.clamp(max=1.0), 2)
            each = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            loss, count = (each * weights).mean(1), torch.ones_like(valid)
        else:
            count = (wanted * weights).sum(1)
            wanted = self._smoothed(wanted, self.num_classes)
            loss = -(wanted * weights * logits.log_softmax(1)).sum(1)
        return Loss({TERM: (loss * valid).sum()}, {HEAD: (count * valid).sum().detach()})

    def _weights(self) -> list[float]:
        """Return the weight of each class; where an image has one, the smallest above 0 is 1.

        The mean over weighted images is the same at any scale, but a mode divides by 1 where the
        count of a batch is smaller.
        """
        weights = self.config.class_weights or [1.0] * self.num_classes
        unit = 1.0 if self.config.several else min(weight for weight in weights if weight > 0)
        return [weight / unit for weight in weights]

    def _wanted(self, batch: Batch, like: Tensor) -> Tensor:
        """Return how much of each class every image is (B, C)."""
        label, weight = batch.targets[..., 0], batch.targets[..., 5].to(like.dtype)
        weight = weight * (label >= 0)  # pads are -1
        return torch.zeros_like(like).scatter_add_(1, label.long().clamp(min=0), weight)

    def _smoothed(self, wanted: Tensor, ways: int) -> Tensor:
        """Spread a share evenly over all ways that a decision can go."""
        return wanted * (1 - self.config.smoothing) + self.config.smoothing / ways

    def _check(self, outputs: Tensor, images: int) -> None:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != (images, self.num_classes):
            raise ConfigError(
                f"model: {got} comes out for {images} images; return logits "
                f"{(images, self.num_classes)}, one for each class"
            )

    def decode(self, outputs: Tensor, batch: Batch) -> list[ClassScores]:
        """Turn logits (B, C) into probabilities, one entry per image; raise as `loss` does."""
        self._check(outputs, len(batch))
        logits = outputs.float()
        scores = logits.sigmoid() if self.config.several else logits.softmax(1)
        return [ClassScores(row, several=self.config.several) for row in scores]
