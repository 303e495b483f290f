"""Data sets of a user's own, passed in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image
from torch import Tensor

from visiontrain.core.errors import ConfigError, DataError, VisiontrainError
from visiontrain.core.explain import short
from visiontrain.core.own import Data, DataSet
from visiontrain.core.types import Sample
from visiontrain.data.build import Judge, Labels, arrays, table_of, whole_images
from visiontrain.data.defects import counted
from visiontrain.data.description import SPLITS, Choice, unique_names
from visiontrain.data.table import Table

Pixels = NDArray[np.uint8]
ROUNDING = 1e-3  # by which floats may leave [0, 1], as interpolated ones do
NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


class OwnReader:
    """Data sets in Python, read once at the start for their labels and sizes."""

    notes: tuple[str, ...] = ()
    root = Path()

    def __init__(self, data: Data, where: str, *, single_cls: bool = False) -> None:
        self.single_cls = single_cls
        sets = {split: getattr(data, split) for split in SPLITS}
        self.splits: Mapping[str, Any] = {k: v for k, v in sets.items() if v is not None}
        for split, dataset in self.splits.items():
            if not len(dataset):
                raise DataError(f"data: {split}: {where} has no samples; give some")
        self.names = unique_names(names_of(data.names), "data")
        first = OwnImages(data.train, "train", range(1)).sample(0)
        self.task = "classify" if first.boxes is None else "detect"
        numbers_of(first.classes, "train[0]", columns=self.task == "detect")
        self.several = self.task == "classify" and np.ndim(first.classes) > 0

    def read(self, split: str, choice: Choice) -> Table:
        """Read every sample once for its size and its labels; pixels are not kept.

        Raises:
            DataError: a sample cannot be read, or is none.
        """
        dataset: DataSet = self.splits[split]
        rows = choice.rows(len(dataset))
        images = OwnImages(dataset, split, rows)
        sizes = np.empty((len(rows), 2), np.int32)
        samples = []
        for row in range(len(rows)):
            sample = images.sample(row)
            sizes[row] = sample.image.shape[1::-1]
            samples.append(replace(sample, image=NO_PIXELS))
        if self.task == "classify":
            return self._classes(images, sizes, samples)
        return self._boxes(images, sizes, samples)

    def _classes(
        self, images: OwnImages, sizes: NDArray[np.int32], samples: Sequence[Sample]
    ) -> Table:
        boxed = [row for row, sample in enumerate(samples) if sample.boxes is not None]
        if boxed:
            raise DataError(
                f"{images.name(boxed[0])}: boxes, where train[0] has none, so that whole images "
                "are classified; for an image without objects give boxes=[]"
            )
        given = [classes_of(sample.classes, images.name(k)) for k, sample in enumerate(samples)]
        counts = np.array([len(label) for label in given], np.int64)
        classes = np.concatenate(given)
        bad = np.flatnonzero((classes < 0) | (classes >= len(self.names)))
        if len(bad):
            row = int(np.searchsorted(np.cumsum(counts), bad[0], side="right"))
            raise DataError(f"{images.name(row)}: {_no_class(int(classes[bad[0]]), self.names)}")
        if not self.several and (counts != 1).any():
            row = int(np.flatnonzero(counts != 1)[0])
            raise DataError(
                f"{images.name(row)}: {counted(int(counts[row]), 'class')}, where the first sample "
                "has a single number; give every one a list for several classes an image"
            )
        return whole_images(self.names, images, sizes, classes, counts, several=self.several)

    def _boxes(
        self, images: OwnImages, sizes: NDArray[np.int32], samples: Sequence[Sample]
    ) -> Table:
        labels = Labels()
        for row, sample in enumerate(samples):
            for box, label in zip(*boxes_of(sample, images.name(row)), strict=True):
                labels.add(row, int(label), box)
        judge = Judge(self.names, images.name, single_cls=self.single_cls)
        boxes = judge(arrays(labels), sizes)
        return table_of(self.names, images, sizes, boxes, judge.defects)


def names_of(given: Any) -> list[str]:
    """Return the names of classes, also of a mapping from their numbers.

    Raises:
        ConfigError: they are no list of names.
    """
    if isinstance(given, Mapping) and sorted(given) == list(range(len(given))):
        given = [given[number] for number in range(len(given))]
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise ConfigError(
            f"data: names: {short(repr(given))}; give a list of names, in the order of the classes"
        )
    return [str(name) for name in given]


def numbers_of(given: Any, where: str, *, columns: bool = False) -> NDArray[np.int64]:
    """Return classes (M,): one number, or a list of them.

    Args:
        given: them.
        where: names the sample.
        columns: whether they may be floats without fractions, as a column beside boxes is.

    Raises:
        DataError: they are texts, fractions or flags.
    """
    try:
        found = np.atleast_1d(np.asarray(given))
    except ValueError:  # lists of unequal lengths
        found = np.empty(1, np.object_)
    if columns and np.issubdtype(found.dtype, np.floating) and (found == np.trunc(found)).all():
        found = found.astype(np.int64)
    whole = not found.size or np.issubdtype(found.dtype, np.integer)
    if not whole or found.shape[1:] not in ((), (1,)):
        raise DataError(
            f"{where}: classes: {short(repr(given))}; give the number of a class, from 0 on, or a "
            "list of such whole numbers"
        )
    return found.astype(np.int64).reshape(-1)


def classes_of(given: Any, where: str) -> NDArray[np.int64]:
    """Return the classes of a whole image (M,), each once.

    Raises:
        DataError: they are no numbers of classes, or one is there twice; `where` names the sample.
    """
    classes = numbers_of(given, where)
    if len(np.unique(classes)) < len(classes):
        raise DataError(
            f"{where}: classes: {short(repr(given))}, with one of them twice; give each once, and "
            "of a row of zeros and ones np.flatnonzero(row)"
        )
    return classes


def _no_class(label: int, names: Sequence[str]) -> str:
    return f"class {label}; `names` has {counted(len(names), 'class')}, numbered from 0"


def boxes_of(sample: Sample, where: str) -> tuple[list[Any], NDArray[np.int64]]:
    """Return the boxes of a sample as tuples, and their classes (M,).

    Raises:
        DataError: they do not go together; `where` names the sample.
    """
    boxes = np.asarray(sample.boxes if sample.boxes is not None else [], np.float64)
    boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
    classes = numbers_of(sample.classes, where, columns=True)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(classes) != len(boxes):
        raise DataError(
            f"{where}: boxes of shape {boxes.shape} and {counted(len(classes), 'class')}; give "
            "boxes (M, 4) and M classes"
        )
    return [tuple(box) for box in boxes.tolist()], classes


@dataclass(frozen=True, slots=True)
class OwnImages:
    """An ImageSource of a user's data set."""

    dataset: DataSet
    split: str
    rows: Sequence[int] | NDArray[np.int64]  # which samples are used

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, row: int) -> str:
        """Name sample `row`."""
        return f"{self.split}[{int(self.rows[row])}]"

    def read(self, row: int) -> Pixels:
        """Return the image of sample `row` (H, W, 3).

        Raises:
            DataError: the data set raised something, or gave no image.
        """
        return self.sample(row).image

    def sample(self, row: int) -> Sample:
        """Return sample `row`; raise as `read` does."""
        where = self.name(row)
        try:
            sample = self.dataset[int(self.rows[row])]
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
        except VisiontrainError:
            raise
        except Exception as error:
            reason = short(f"{type(error).__name__}: {error}")
            raise DataError(f"{where}: {reason}; mend it in the data set") from error
        if not isinstance(sample, Sample):
            raise DataError(
                f"{where}: a {type(sample).__name__}; return a visiontrain.Sample, or wrap a "
                "torch Dataset in visiontrain.TorchData"
            )
        image = sample.image
        good = isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size
        if not good or image.shape[2:] != (3,):
            got = f"{getattr(image, 'dtype', type(image).__name__)} {getattr(image, 'shape', '')}"
            raise DataError(f"{where}: image: {got}; give a numpy array of uint8, (H, W, 3), RGB")
        return sample


def reads_own(images: Any) -> bool:
    """Tell whether a source reads a user's data set, which need not stand several threads."""
    inner = getattr(images, "images", None)  # of a source that is a choice of another's rows
    return isinstance(images, OwnImages) or (inner is not None and reads_own(inner))


# -- torch's data sets -----------------------------------------------------------------


class TorchData:
    """A torch `Dataset` as a data set of ours.

    Understood are items (image, class) and (image, {"boxes": (M, 4) xyxy, "labels": (M,)}), as
    torchvision's data sets give them; images as PIL's, as arrays (H, W, 3) or as tensors
    (3, H, W), of uint8, or floats in [0, 1].
    """

    def __init__(self, dataset: Any, convert: Callable[[Any], Sample] | None = None) -> None:
        """Wrap a data set.

        Args:
            dataset: the torch Dataset, without random transforms: what is random is drawn here.
            convert: turns one of its items into a `Sample`, where they are others.
        """
        self.dataset = dataset
        self.convert = convert or from_torch

    @property
    def wraps(self) -> Any:
        """What config.yaml names: of all adapters the name is the same."""
        return self.dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        """Return item `index` as a sample."""
        return self.convert(self.dataset[index])


def from_torch(item: Any) -> Sample:
    """Turn an item as torchvision's data sets give it into a sample.

    Raises:
        ConfigError: it is another; a function of the user's has to tell what it is.
    """
    match item:
        case (image, {"boxes": boxes, "labels": labels}):
            form = getattr(getattr(boxes, "format", None), "name", "XYXY")
            if form != "XYXY":
                raise ConfigError(f"boxes in {form}; give BoundingBoxes in XYXY: x1, y1, x2, y2")
            return Sample(_pixels(image), _array(labels), _array(boxes))
        case (image, {"image_id": _, **rest}) if not rest:  # torchvision's, of no objects
            return Sample(_pixels(image), [], [])
        case (image, int() | np.integer() as label):
            return Sample(_pixels(image), int(label))
        case (image, Tensor() as label) if label.ndim == 0 and not label.is_floating_point():
            return Sample(_pixels(image), int(label))
    raise ConfigError(
        f"an item {short(item)}; give TorchData(dataset, convert=...) a function that turns "
        "it into a visiontrain.Sample"
    )


def _array(value: Any) -> NDArray[Any]:
    return value.numpy() if isinstance(value, Tensor) else np.asarray(value)


def _pixels(image: Any) -> Pixels:
    """Turn an image into (H, W, 3) uint8."""
    # Of a palette numpy sees numbers of colours. PIL would cut off what is deeper than 8 bit.
    if isinstance(image, Image) and image.mode not in ("L", "RGB") and image.mode[0] not in "IF":
        image = image.convert("RGB")
    pixels = image.permute(1, 2, 0).numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is not, either
            raise DataError(
                f"an image of floats from {low:.3g} to {high:.3g}; give uint8, or floats in "
                "[0, 1]: leave Normalize out, it belongs into the model"
            )
        pixels = (pixels * 255).round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
