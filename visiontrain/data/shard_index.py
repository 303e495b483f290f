"""The index of the shards of a split: where each image lies, and all labels, in one file.

A safetensors file of flat arrays, mapped into memory: the processes of a run share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from visiontrain.core.errors import DataError
from visiontrain.data.defects import DEFECTS
from visiontrain.data.images import Paths
from visiontrain.data.remote import ShardStore, file_name
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.table import Defect, Table

VERSION = 1
KINDS = {  # safetensors' names of what is stored here
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
}
TYPES: Mapping[str, type[np.generic]] = {
    **dict.fromkeys(("tar_sizes", "starts", "offsets", "lengths"), np.int64),
    **dict.fromkeys(("name_offsets", "box_offsets", "image_ids", "category_ids"), np.int64),
    **dict.fromkeys(("sizes", "classes"), np.int32),
    **dict.fromkeys(("boxes", "area"), np.float32),
    **dict.fromkeys(("crowd", "difficult"), np.bool_),
    "name_bytes": np.uint8,
}
LARGEST_HEAD = 1 << 28  # bytes of JSON that are believed
Arrays = Mapping[str, NDArray[Any]]


def index_bytes(table: Table) -> bytes:
    """Return the index file of a table whose images lie in shards."""
    images = cast("ShardImages", table.images)
    arrays = {
        "tar_sizes": images.tar_sizes,
        "starts": images.starts,
        "offsets": images.offsets,
        "lengths": images.lengths,
        "name_bytes": images.members.blob,
        "name_offsets": images.members.offsets,
        "sizes": table.sizes,
        "box_offsets": table.offsets,
        "boxes": table.boxes,
        "classes": table.classes,
        "crowd": table.crowd,
        "difficult": table.difficult,
        "area": table.area,
    }
    ids = {"image_ids": table.image_ids, "category_ids": table.category_ids}
    arrays |= {name: array for name, array in ids.items() if array is not None}
    head = {
        "version": VERSION,
        "names": table.names,
        "task": table.task,
        "several": table.several,
        "tars": [file_name(tar) for tar in images.tars],
        "defects": [[d.file, d.line, d.kind, d.reason] for d in table.defects],
    }
    plain = {name: np.ascontiguousarray(array, TYPES[name]) for name, array in arrays.items()}
    return save(plain, {"visiontrain": json.dumps(head)})


def read_index(path: Path, tars: Sequence[str], store: ShardStore, max_pixels: int) -> Table:
    """Return the table that an index holds, its images in `tars`.

    Raises:
        DataError: the file is no index, is damaged, or is one of other tars.
    """
    try:
        head, arrays = _mapped(path)
        _check(head, arrays)
        known = head["tars"]
        table = _table(head, arrays, tuple(tars), store, max_pixels)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); correct `index:`, or remove it "
            "and the tars are read through instead"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path}: no index of shards, or damaged ({error}); remove `index:` and the tars are "
            "read through instead"
        ) from error
    if known != [file_name(tar) for tar in tars]:
        raise DataError(
            f"{path}: an index of {_few(known)}, but the split names {_few(tars)}; name those "
            "that belong together"
        )
    return table


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (f", ... ({len(names):,} tars)" if len(names) > 2 else "")


def _mapped(path: Path) -> tuple[Mapping[str, Any], Arrays]:
    """Map a safetensors file: the JSON in its head, and its arrays."""
    raw = np.memmap(path, np.uint8, "r").view(np.ndarray)
    length = int.from_bytes(raw[:8].tobytes(), "little")
    if length > min(LARGEST_HEAD, len(raw) - 8):
        raise ValueError("its head is longer than the file")
    entries = json.loads(raw[8 : 8 + length].tobytes())
    head = json.loads(entries.pop("__metadata__")["visiontrain"])
    body = raw[8 + length :]
    arrays = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        if not 0 <= start <= stop <= len(body):
            raise ValueError(f"{name} lies outside of the file")
        arrays[name] = body[start:stop].view(KINDS[entry["dtype"]]).reshape(entry["shape"])
    return head, arrays


def _check(head: Mapping[str, Any], arrays: Arrays) -> None:
    """Refuse an index that would lead astray: its head, lengths, ranges and order of its arrays."""
    if head["version"] != VERSION:
        raise ValueError(f"version {head['version']}, this program reads {VERSION}")
    if head["task"] not in ("detect", "classify"):
        raise ValueError(f"task {head['task']!r}")
    names = head["names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names that are no texts")
    _check_defects(head["defects"])
    images, boxes, tars = len(arrays["offsets"]), len(arrays["classes"]), len(head["tars"])
    _check_arrays(arrays, images, boxes, tars, len(names))
    _check_runs("starts", arrays["starts"], tars, images)
    _check_runs("box_offsets", arrays["box_offsets"], images, boxes)
    _check_runs("name_offsets", arrays["name_offsets"], images, len(arrays["name_bytes"]))
    classes, places = arrays["classes"], arrays["offsets"]
    if boxes and not 0 <= classes.min() <= classes.max() < len(names):
        raise ValueError("a class is not among the names")
    ends = places + arrays["lengths"]
    of_each = np.repeat(arrays["tar_sizes"], np.diff(arrays["starts"]))
    if images and ((places < 0) | (ends < places) | (ends > of_each)).any():
        raise ValueError("an image lies outside of its tar")
    _check_labels(arrays, single=head["task"] == "classify" and not head["several"])


def _check_defects(rows: Sequence[Any]) -> None:
    """Refuse defects that nobody could count or tell."""
    for file, line, kind, reason in rows:
        texts = isinstance(file, str) and isinstance(reason, str)
        if not texts or not isinstance(line, int | None) or kind not in DEFECTS:
            raise ValueError(f"a defect {kind!r:.40} that is not known, or of other types")


def _check_labels(arrays: Arrays, *, single: bool) -> None:
    """Refuse labels that no table has: boxes outside of images, or other than one class an image.

    Args:
        arrays: of right lengths and types.
        single: whether each image has one class.
    """
    sizes, counts = arrays["sizes"], np.diff(arrays["box_offsets"])
    if (sizes < 1).any():
        raise ValueError("an image without pixels")
    if single and (counts != 1).any():
        raise ValueError("an image of other than one class")
    low, high = arrays["boxes"][:, :2], arrays["boxes"][:, 2:]
    # In single precision, as the boxes were rounded: a side beyond 2**24 may have grown by that.
    limits = np.repeat(sizes.astype(np.float32), counts, axis=0)
    if not ((low >= 0) & (high > low) & (high <= limits)).all():  # nor are NaNs
        raise ValueError("a box lies outside of its image, or is empty")
    if not (np.isfinite(arrays["area"]) & (arrays["area"] >= 0)).all():
        raise ValueError("an area that is none")


def _check_arrays(arrays: Arrays, images: int, boxes: int, tars: int, names: int) -> None:
    """Refuse arrays of other types or shapes than are written here."""
    shapes = {
        "tar_sizes": (tars,),
        **dict.fromkeys(("offsets", "lengths"), (images,)),
        "sizes": (images, 2),
        "boxes": (boxes, 4),
        **dict.fromkeys(("classes", "crowd", "difficult", "area"), (boxes,)),
        "name_bytes": (arrays["name_bytes"].size,),
    }
    optional = {"image_ids": (images,), "category_ids": (names,)}
    shapes |= {name: shape for name, shape in optional.items() if name in arrays}
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has {arrays[name].shape}, not {shape}")
    for name, array in arrays.items():
        if array.dtype != TYPES[name]:
            raise ValueError(f"{name} is of {array.dtype}, not {np.dtype(TYPES[name])}")


def _check_runs(name: str, starts: NDArray[np.int64], runs: int, total: int) -> None:
    """Refuse offsets (runs + 1,) that do not cut `total` into runs."""
    right = starts.shape == (runs + 1,) and starts[0] == 0 and starts[-1] == total
    if not right or (np.diff(starts) < 0).any():
        raise ValueError(f"{name} are no offsets")


def _table(
    head: Mapping[str, Any],
    arrays: Arrays,
    tars: tuple[str, ...],
    store: ShardStore,
    max_pixels: int,
) -> Table:
    images = ShardImages(
        tars=tars,
        tar_sizes=arrays["tar_sizes"],
        starts=arrays["starts"],
        offsets=arrays["offsets"],
        lengths=arrays["lengths"],
        members=Paths.of_arrays(arrays["name_bytes"], arrays["name_offsets"]),
        store=store,
        max_pixels=max_pixels,
    )
    return Table(
        names=tuple(head["names"]),
        images=images,
        sizes=arrays["sizes"],
        offsets=arrays["box_offsets"],
        boxes=arrays["boxes"],
        classes=arrays["classes"],
        crowd=arrays["crowd"],
        difficult=arrays["difficult"],
        area=arrays["area"],
        defects=tuple(Defect(*row) for row in head["defects"]),
        image_ids=arrays.get("image_ids"),
        category_ids=arrays.get("category_ids"),
        task=head["task"],
        several=bool(head["several"]),
    )


def rows_of(table: Table, rows: NDArray[np.int64]) -> Table:
    """Return a table of some images, `rows` ascending."""
    if len(rows) == len(table):
        return table
    return table.chosen(rows, cast("ShardImages", table.images).select(rows))
