"""Values that cross layer borders: frozen, with their shapes written at the field.

B images of a micro-batch, M target rows (padded), N detections, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class Sample:
    """One image and its labels, as a data set of a user's own gives it.

    Without boxes it is for classification: `classes` is what the whole image shows, one class or
    any number of them.
    """

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    classes: int | Sequence[int] | NDArray[np.integer]  # of the image; with boxes of each, (M,)
    boxes: NDArray[np.floating] | Sequence[Sequence[float]] | None = None  # (M, 4): xyxy, pixels


@dataclass(frozen=True, slots=True)
class Item:
    """One image, ready to be collated."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    targets: NDArray[np.float32]  # (M, 6): class, x1, y1, x2, y2 (pixels of `image`), weight
    frame: NDArray[np.float32]  # (5,): scale, pad x, pad y, original width, original height
    id: int  # row in the table


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. Targets are padded, so it can be cut anywhere along B."""

    images: Tensor  # (B, 3, H, W): uint8 from the loader, floats in [0, 1] after `to`
    targets: Tensor  # (B, M, 6): class, x1, y1, x2, y2, weight; class is -1 where padded
    ids: Tensor  # (B,) int64: row in the table
    frame: Tensor  # (B, 5): scale, pad x, pad y, original width, original height
    valid: Tensor  # (B,): 1, or 0 for an image that only fills a place and adds to no term

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Batch:
        """Move to `device`; images become `dtype` in [0, 1], targets and frame `dtype`.

        Images come out with channels last in memory: convolutions then run so, which is 5 to 50 %
        faster on a CPU, most with small batches (DECISIONS.md, 7).
        """
        images = moved(self.images, device)
        if images.dtype == torch.uint8:
            images = images.to(dtype).div_(255)
        return Batch(
            images=images.to(dtype).contiguous(memory_format=torch.channels_last),
            targets=moved(self.targets, device).to(dtype),
            ids=moved(self.ids, device),
            frame=moved(self.frame, device).to(dtype),
            valid=moved(self.valid, device).to(dtype),
        )


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device; to a GPU without waiting for what it still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True, slots=True)
class Views:
    """How an image is looked at to be scored: outputs are the mean over these ways.

    Shifted ones count half together (Jordan 2024, arXiv 2404.00498).
    """

    mirrored: bool = False
    shift: int = 0  # pixels, down-right and up-left; what comes in from the border is mirrored

    def of(self, images: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield images (B, 3, S, S) as they are looked at, each with its share; all add up to 1."""
        sides = [images, images.flip(3)] if self.mirrored else [images]
        for one in sides:
            if not self.shift:
                yield 1 / len(sides), one
                continue
            yield 1 / 2 / len(sides), one
            wide, end = pad(one, (self.shift,) * 4, mode="reflect"), 2 * self.shift
            for part in (wide[..., :-end, :-end], wide[..., end:, end:]):
                yield 1 / 4 / len(sides), part.contiguous(memory_format=torch.channels_last)


AS_IT_IS = Views()


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums and counts of one micro-batch, never means: they add up over micro-batches and ranks.

    A parameter answers to the terms of one head only, so dividing the summed *gradient* by the
    summed count gives the gradient of one big batch, however the batch was cut.
    """

    terms: Mapping[str, Tensor]  # each (): "head/term" -> sum, gains included
    counts: Mapping[str, Tensor]  # each (): head -> what its terms are to be divided by

    def total(self) -> Tensor:
        """Return the sum of the terms: what is differentiated."""
        return torch.stack(list(self.terms.values())).sum()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimizer update did. Tensors stay on the device until they are logged."""

    terms: Mapping[str, Tensor]  # each (): sum over the whole batch / its head's count
    counts: Mapping[str, Tensor]  # each (): head -> what its terms were divided by
    grad_norm: Tensor  # (): before clipping


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector says of one image, in the image's original pixels, best score first."""

    boxes: Tensor  # (N, 4): x1, y1, x2, y2
    scores: Tensor  # (N,)
    classes: Tensor  # (N,) int64
    names: tuple[str, ...] = ()  # N names of `classes`, where a Detector gave them


LIKELY = 0.5  # probability from which one of several labels counts as found


@dataclass(frozen=True, slots=True)
class ClassScores:
    """What a classifier says of one image."""

    scores: Tensor  # (C,): probabilities; of several labels each by itself
    names: tuple[str, ...] = ()  # C names, where a Classifier gave them
    several: bool = False  # an image may have any number of classes

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the `count` likeliest classes, best first, by name (or number) and score."""
        values, index = self.scores.topk(min(count, len(self.scores)))
        pairs = zip(index.tolist(), values.tolist(), strict=True)
        return [(self.names[k] if self.names else str(k), value) for k, value in pairs]

    def likely(self, least: int = 5) -> list[tuple[str, float]]:
        """Return the likeliest classes as `top` does; of several labels all from LIKELY on."""
        found = int((self.scores >= LIKELY).sum()) if self.several else 0
        return self.top(max(least, found))


Prediction = Detections | ClassScores


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    metrics: Mapping[str, Any]  # flat names -> numbers; empty when it was stopped
    exit_code: int  # 0 only when complete
    rows: Tensor | None = None  # (K, columns) float64: the evaluator's, of the final scores


@dataclass(frozen=True, slots=True)
class ClassRows:
    """How a tensor's rows belong to classes: `groups` times (`others` + classes) times `each`."""

    groups: int = 1  # such as the anchors of one place
    others: int = 0  # before the classes, such as the background
    each: int = 1  # of one class, such as the sides of its box

    def count(self, classes: int) -> int:
        """Return how many rows there are for so many classes."""
        return self.groups * (self.others + classes) * self.each

    def split(self, tensor: Tensor) -> Tensor:
        """View a tensor (rows, ...) as (groups, others + classes, each, ...)."""
        return tensor.reshape(self.groups, -1, self.each, *tensor.shape[1:])


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a tensor's rows, which another process has the rest of."""

    rows: Tensor  # on the CPU
    start: int  # the first one's place in the whole tensor
    shape: tuple[int, ...]  # of the whole tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the others."""

    device: torch.device
    rank: int = 0
    world: int = 1
    shard: tuple[int, int] = (0, 1)  # (index, total): which share of each batch it reads
    is_main: bool = True  # it logs and writes checkpoints
    local_world: int | None = None  # processes on this machine; None: all
    before: tuple[torch.device, ...] = ()  # devices of this process's earlier blocks
