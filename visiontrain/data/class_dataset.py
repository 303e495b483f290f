"""Samples for classification: whole batches at once, mixed and erased."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visiontrain.core.types import Batch
from visiontrain.data.collate import collate
from visiontrain.data.config import AugmentSection, ClassifyAugment
from visiontrain.data.letterbox import GREY
from visiontrain.data.mixing import Mixture, draw_mixture, erase, mix
from visiontrain.data.order import SHUFFLED, Order
from visiontrain.data.reader import Reader
from visiontrain.data.sampler import Key
from visiontrain.data.table import Table
from visiontrain.data.views import Rows, build_views, centre

PLAIN = ClassifyAugment(crop=1.0, fliplr=0.0)  # augment=none
Weighted = list[tuple[int, float]]  # class, weight


class LabelledEval:
    """The middle square of every image once, nothing random."""

    def __init__(self, table: Table, imgsz: int) -> None:
        self.table, self.imgsz = table, imgsz
        self.reader = Reader(table)

    def __len__(self) -> int:
        return len(self.table)

    def cell(self, rows: Sequence[int]) -> Batch:
        """Return the images of `rows`; a blank one for none, and, invalid, for the unreadable."""
        if not rows:
            return collate([], self.imgsz)
        blank = np.full((self.imgsz, self.imgsz, 3), GREY, np.uint8)
        read = [self.reader.read(row) for row in rows]
        pixels = np.stack([blank if image is None else centre(image, self.imgsz) for image in read])
        labels = [weighted(self.table, row, 1.0) for row in rows]
        valid = torch.tensor([float(image is not None) for image in read])
        return replace(batch_of(pixels, labels, np.array(rows, np.int64)), valid=valid)

    def merge(self, rows: Tensor) -> Tensor:
        """Return rows as they are: whole images are looked at."""
        return rows


class LabelledTraining:
    """Augmented batches; each sample is a pure function of (seed, epoch, entry) and the files."""

    def __init__(
        self,
        table: Table,
        imgsz: int,
        augment: AugmentSection,
        *,
        seed: int,
        epochs: int,
        order: Order = SHUFFLED,
    ) -> None:
        del epochs  # nothing changes towards the end
        self.order = order
        self.table, self.imgsz, self.seed = table, imgsz, seed
        plain = PLAIN.model_copy(update={"own": augment.own})
        self.config = augment if isinstance(augment, ClassifyAugment) else plain
        self.views = build_views(table, imgsz, self.config)

    def __len__(self) -> int:
        return len(self.table)

    def cell(self, keys: Sequence[Key], step: int) -> Batch:
        """Return the samples of `keys` (epoch, entry), all of one epoch; a blank one for none."""
        del step
        if not keys:
            return collate([], self.imgsz)
        epoch, entries = keys[0][0], np.array([entry for _, entry in keys], np.int64)
        key = (self.seed, epoch)
        pixels, found = self.views(entries, (*key, "own"))
        labels = [weighted(self.table, row, 1.0) for row in found.tolist()]
        mixture = draw_mixture(entries, key, self.config.mixup, self.config.cutmix, self.imgsz)
        if len(mixture.mixed):
            beside = entries[mixture.mixed]
            chosen = self.order.chosen(mixture.partners, beside, len(self), key)
            others, partners = self.views(chosen, (*key, "partner"))
            mix(pixels, others, mixture)
            self._share(labels, partners, mixture)
        erase(pixels, entries, key, self.config.erasing)
        return batch_of(pixels, labels, found)

    def _share(self, labels: list[Weighted], partners: Rows, mixture: Mixture) -> None:
        """Let mixed pictures have the classes of both, each by its share."""
        shares = mixture.share.tolist()
        for place, partner, share in zip(
            mixture.mixed.tolist(), partners.tolist(), shares, strict=True
        ):
            own = [(label, weight * share) for label, weight in labels[place]]
            labels[place] = own + weighted(self.table, partner, 1 - share)


def weighted(table: Table, row: int, weight: float) -> Weighted:
    """Return the classes of an image, each with a weight."""
    return [(label, weight) for label in table.classes[table.rows(row)].tolist()]


def batch_of(pixels: NDArray[np.uint8], labels: Sequence[Weighted], rows: Rows) -> Batch:
    """Put pictures (B, S, S, 3) and their classes into a batch; each class is a whole image."""
    count, side = len(pixels), pixels.shape[1]
    targets = np.zeros((count, max(1, *map(len, labels)), 6), np.float32)
    targets[..., 0] = -1
    for target, own in zip(targets, labels, strict=True):
        for k, (label, weight) in enumerate(own):
            target[k] = label, 0, 0, side, side, weight
    frame = np.tile(np.array([1, 0, 0, side, side], np.float32), (count, 1))
    return Batch(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
        targets=torch.from_numpy(targets),
        ids=torch.from_numpy(rows.copy()),
        frame=torch.from_numpy(frame),
        valid=torch.ones(count),
    )
