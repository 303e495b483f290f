"""Tars in WebDataset's layout, written image by image, and the places where each came to lie."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontrain.core.interfaces import ImageSource
from visiontrain.data.header import SUFFIXES, read_header
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.remote import ShardStore
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.shard_index import index_bytes
from visiontrain.data.table import Table

MB = 10**6
DIGITS = 6  # of the numbers in names


@dataclass(slots=True)
class Written:
    """Where the images of one split came to lie."""

    tars: list[str] = field(default_factory=list)  # names
    sizes: list[int] = field(default_factory=list)  # bytes of each
    starts: list[int] = field(default_factory=lambda: [0])
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    members: list[str] = field(default_factory=list)


def write_split(
    folder: Path, split: str, table: Table, order: NDArray[np.int64], size_mb: float
) -> Written:
    """Write the images of `table` in `order` to tars of about `size_mb`, and their index.

    Raises:
        ImageError: an image cannot be read any more.
        OSError: a tar cannot be written.
    """
    done, rows = Written(), iter(order.tolist())
    images = len(order)
    while len(done.offsets) < images:
        name = f"{split}-{len(done.tars):0{DIGITS}d}.tar"
        with _tar(folder / name) as (file, tar):
            while len(done.offsets) < images and file.tell() < size_mb * MB:
                _add_sample(tar, table, next(rows), done)
        done.tars.append(name)
        done.sizes.append((folder / name).stat().st_size)
        done.starts.append(len(done.offsets))
    moved = table.chosen(order, _source(done))
    with (folder / index_name(split)).open("wb") as file:
        file.write(index_bytes(replace(moved, defects=())))
        _sync(file)
    return done


def index_name(split: str) -> str:
    """Name the index of a split."""
    return f"{split}.safetensors"


@contextmanager
def _tar(path: Path) -> Iterator[tuple[io.BufferedWriter, tarfile.TarFile]]:
    """Open a tar to write, and wait in the end until it is on the disk."""
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            yield file, tar
        _sync(file)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _add_sample(tar: tarfile.TarFile, table: Table, row: int, done: Written) -> None:
    number = f"{len(done.offsets):0{DIGITS}d}"
    data, suffix = encoded(table.images, row)
    done.members.append(f"{number}{suffix}")
    done.lengths.append(len(data))
    done.offsets.append(_add(tar, done.members[-1], data))
    text, kind = label_of(table, row)
    _add(tar, f"{number}.{kind}", text.encode())


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member; return where its content begins."""
    info = tarfile.TarInfo(name)  # of no owner and no time: the same images give the same tar
    info.size = len(data)
    start = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    tar.members.clear()  # pyrefly: ignore - it would hold the header of every member
    return start


def encoded(images: ImageSource, row: int) -> tuple[bytes, str]:
    """Return an image's file as it is and its suffix; PNG where there is no file."""
    if isinstance(images, FileImages | ShardImages):
        data, name = images.read_bytes(row), images.name(row)
        suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - no path: a tar's member
        if suffix not in SUFFIXES:  # by which other readers know a picture
            suffix = f".{read_header(io.BytesIO(data), name, images.max_pixels).format}"
        return data, suffix
    pixels = cv2.cvtColor(images.read(row), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels)[1].tobytes(), ".png"


def label_of(table: Table, row: int) -> tuple[str, str]:
    """Return the text of an image's label and the suffix that says how to read it."""
    boxes = table.rows(row)
    classes = table.classes[boxes].tolist()
    if table.task == "classify" and not table.several:
        return str(classes[0]), "cls"
    content: dict[str, Any] = {"classes": classes}
    if table.task == "detect":
        content = {"boxes": [_numbers(box) for box in table.boxes[boxes]], **content}
        content |= {
            name: flags.astype(int).tolist()
            for name, flags in (
                ("crowd", table.crowd[boxes]),
                ("difficult", table.difficult[boxes]),
            )
            if flags.any()
        }
        content["area"] = _numbers(table.area[boxes])
    if table.image_ids is not None:
        content["image_id"] = int(table.image_ids[row])
    return json.dumps(content), "json"


def _numbers(values: NDArray[np.float32]) -> list[float]:
    """Write single precision in the digits that it has: 8.1, not 8.100000381."""
    return [float(f"{value:.9g}") if value % 1 else int(value) for value in values.tolist()]


def _source(done: Written) -> ShardImages:
    return ShardImages(
        tars=tuple(done.tars),
        tar_sizes=np.array(done.sizes, np.int64),
        starts=np.array(done.starts, np.int64),
        offsets=np.array(done.offsets, np.int64),
        lengths=np.array(done.lengths, np.int64),
        members=Paths(done.members),
        store=ShardStore(Path(), 1),
        max_pixels=1,
    )
