"""One tar in WebDataset's layout, read through once: where its images lie, and their labels.

Only headers and labels are read. Names are never used as paths; nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any, cast

import numpy as np

from visiontrain.data.build import Labels
from visiontrain.data.header import ImageError
from visiontrain.data.scan import Found, look_into
from visiontrain.data.table import Defect
from visiontrain.data.walk import PICTURES

PICKLED = frozenset({"pickle", "pkl", "pt", "pth", "pyd"})  # could run code when decoded
LABELLED = ("cls", "json", "txt")  # a class, JSON, the name of a class; the first is taken
END = bytes(tarfile.BLOCKSIZE)  # of zeros: what ends a tar
# What tarfile raises at damaged headers: numbers that are none, or beyond any file, and long
# names of long names, thousands deep.
TROUBLE = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    LookupError,
    OSError,
    RecursionError,
)
LONGEST = 1 << 24  # bytes of a label that are believed
Token = int | str  # a class, by number or name
WHOLE = (0.0, 0.0, np.inf, np.inf)  # a class of a whole image, while its size is not asked for


@dataclass(frozen=True, slots=True)
class Label:
    """What a label member says of a sample."""

    classes: Sequence[Token]
    boxes: Sequence[Sequence[float]] | None = None  # x1, y1, x2, y2; None: of the whole image
    crowd: Sequence[bool] = ()
    difficult: Sequence[bool] = ()
    area: Sequence[float] = ()
    image_id: int | None = None
    listed: bool = False  # classes of a whole image, of which there may be any number


@dataclass(slots=True)
class Sample:
    """Members of one basename that follow each other."""

    key: str
    image: tarfile.TarInfo | None = None
    label: tarfile.TarInfo | None = None


@dataclass(slots=True)
class TarScan:
    """What one tar holds; samples that cannot be used are among the defects only."""

    size: int = 0  # bytes of the tar
    members: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)  # of each box
    labels: Labels = field(default_factory=Labels)  # whose classes are yet to be filled in
    ids: list[int] = field(default_factory=list)  # of images; -1: none
    boxed: bool = False
    listed: bool = False
    pickled: Counter[str] = field(default_factory=Counter)  # members by suffix
    defects: list[Defect] = field(default_factory=list)


def scan_tar(open_tar: Callable[[], int], name: str, max_pixels: int) -> TarScan:
    """Read through a tar, which messages call `name`.

    Args:
        open_tar: returns a descriptor: a path could be removed between two uses.
        name: path or URL of the tar.
        max_pixels: larger images are defects.
    """
    found = TarScan()
    try:
        with os.fdopen(open_tar(), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            found.size = os.fstat(file.fileno()).st_size
            for sample in _samples(tar, name, found):
                _take(tar, sample, name, max_pixels, found)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        found.defects.append(Defect(name, None, "unreadable-shard", reason))
    except TROUBLE as error:
        reason = f"no uncompressed tar ({error}); decompress it, or write it again"
        found.defects.append(Defect(name, None, "unreadable-shard", reason))
    return found


def _members(tar: tarfile.TarFile, name: str, found: TarScan) -> Iterator[tarfile.TarInfo]:
    """Yield plain files, up to where the tar ends or is damaged.

    Hidden ones are left out: beside each file macOS stores what it knows of it, as `._a.jpg`.
    """
    last, reason = "its start", ""
    try:
        for member in iter(tar.next, None):
            tar.members.clear()  # pyrefly: ignore - it would hold every header of a large tar
            last = member.name
            if member.size < 0 or member.offset_data + member.size > found.size:
                raise tarfile.ReadError("a member reaches past the end")
            unsafe = _unsafe(member)
            if unsafe:
                place = f"{name}/{member.name}"
                found.defects.append(Defect(place, None, "unsafe-member", unsafe))
            elif not (member.isdir() or PurePosixPath(member.name).name.startswith(".")):
                yield member
        file = cast("IO[bytes]", tar.fileobj)
        file.seek(tar.offset)
        if file.read(len(END)) != END:
            reason = "is damaged, or lacks its end mark,"
    except TROUBLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a header's numbers
            raise  # it says nothing of the tar, and is not to be remembered
        reason = f"is damaged or ends early ({error})"
    if reason:
        text = f"{reason} at or after {last}; what follows is lost"
        found.defects.append(Defect(name, None, "truncated-shard", text))


def _samples(tar: tarfile.TarFile, name: str, found: TarScan) -> Iterator[Sample]:
    """Group members that follow each other by what stands before their first dot."""
    sample = Sample("")
    for member in _members(tar, name, found):
        key, suffix = _parts(member.name)
        if sample.key != key:
            yield sample
            sample = Sample(key)
        _assign(sample, member, suffix, name, found)
    yield sample


def _unsafe(member: tarfile.TarInfo) -> str | None:
    """Say why a member is not read."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "no plain file; store the file itself"
    path = PurePosixPath(member.name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of the tar; rename it"
    return None


def _parts(name: str) -> tuple[str, str]:
    """Cut a name at the first dot of its last part: `a/b.c.JPG` is `a/b` and `c.jpg`."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _assign(
    sample: Sample, member: tarfile.TarInfo, suffix: str, name: str, found: TarScan
) -> None:
    """Take a member as the image or the label of its sample, if it is one."""
    last = suffix.rpartition(".")[2]
    if last in PICKLED:
        found.pickled[last] += 1
    elif f".{last}" in PICTURES:
        _picture(sample, member, name, found)
    elif suffix in LABELLED and (
        sample.label is None
        or LABELLED.index(suffix) < LABELLED.index(_parts(sample.label.name)[1])
    ):
        sample.label = member


def _picture(sample: Sample, member: tarfile.TarInfo, name: str, found: TarScan) -> None:
    """Take the first picture, but rather `a.jpg` than `a.depth.png`."""
    if sample.image is None or (_is_plain(member) and not _is_plain(sample.image)):
        sample.image = member
    elif _is_plain(member):
        reason = f"a second picture beside {sample.image.name}, which is taken"
        found.defects.append(Defect(f"{name}/{member.name}", None, "extra-picture", reason))


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Tell `a.jpg` from `a.depth.jpg`."""
    return "." not in _parts(member.name)[1]


def _take(tar: tarfile.TarFile, sample: Sample, name: str, max_pixels: int, found: TarScan) -> None:
    """Look at the image and the label of one sample."""
    where = f"{name}/{sample.image.name if sample.image else sample.key}"
    if sample.image is None or sample.label is None:
        if sample.image is None and sample.label is None:
            return  # of another kind: nothing was meant to be trained on
        kind = "missing-label" if sample.image else "missing-image"
        reason = "no label beside it" if sample.image else "no image beside its label"
        found.defects.append(Defect(where, None, kind, f"{reason}"))
        return
    try:
        with cast("IO[bytes]", tar.extractfile(sample.image)) as file:
            seen = look_into(file, where, max_pixels)  # pyrefly: ignore
    except ImageError as error:
        found.defects.append(Defect(where, None, error.kind, error.reason))
        return
    label = _label(tar, sample.label, name)
    if isinstance(label, Defect):
        found.defects.append(label)
    else:
        _add(sample.image, seen, label, found)


def _add(image: tarfile.TarInfo, seen: Found, label: Label, found: TarScan) -> None:
    row = len(found.members)
    found.members.append(image.name)
    found.offsets.append(image.offset_data)
    found.lengths.append(image.size)
    found.sizes.append(seen.size)
    found.ids.append(-1 if label.image_id is None else label.image_id)
    if seen.defect is not None:
        found.defects.append(seen.defect)
    found.boxed |= label.boxes is not None
    found.listed |= label.listed
    for k, token in enumerate(label.classes):
        box = WHOLE if label.boxes is None else label.boxes[k]
        found.tokens.append(token)
        found.labels.add(
            row,
            -1,
            (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
            crowd=label.crowd[k] if label.crowd else False,
            difficult=label.difficult[k] if label.difficult else False,
            area=label.area[k] if label.area else np.nan,
        )


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Label | Defect:
    """Read a label; a defect when it says nothing that is understood."""
    where, suffix = f"{name}/{member.name}", _parts(member.name)[1]
    if member.size > LONGEST:
        return Defect(where, None, "unreadable-labels", f"{member.size:,} bytes are no label")
    with cast("IO[bytes]", tar.extractfile(member)) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig").strip()
        return read_json(text) if suffix == "json" else Label([_token(_number(_line(text)))])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        return Defect(where, None, "unreadable-labels", f"no label that is read ({error})")


def _line(text: str) -> str:
    """Check the text of a class: YOLO's rows of boxes would become thousands of names."""
    words = text.split()
    rows = len(words) >= 5 and all(word.strip("-+").replace(".", "").isdigit() for word in words)
    if len(text.splitlines()) > 1 or rows:
        raise ValueError(
            "lines or rows of numbers, where one class is wanted; write boxes as .json"
        )
    return text


def _number(text: str) -> Token:
    return int(text) if text.isdecimal() and text.isascii() else text


def _token(value: Any) -> Token:
    """Check a class: a number or a name."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31:
        return value
    raise ValueError(f"a class {value!r:.40}")


def read_json(text: str) -> Label:
    """Read a label in JSON: `boxes` and `classes`, `classes` alone, or one `class` or `label`.

    Raises:
        ValueError: it is none; KeyError, TypeError, OverflowError and RecursionError likewise.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError("no object with boxes and classes")
    if "classes" not in value:
        one = next((value[key] for key in ("class", "label", "cls") if key in value), None)
        return Label([_token(one)])
    classes = [_token(item) for item in _list(value["classes"])]
    if "boxes" not in value:
        return Label(list(dict.fromkeys(classes)), listed=True)
    return _boxed(classes, value)


def _list(value: Any) -> list[Any]:
    """Check a list; an object or a text has a length, too."""
    if not isinstance(value, list):
        raise TypeError(f"{value!r:.40} is no list")
    return value


def _flag(value: Any) -> bool:
    """Check a flag: true, false or a number; "0" would be true."""
    if not isinstance(value, bool | int | float):
        raise TypeError(f"a flag {value!r:.40}")
    return bool(value)


def _boxed(classes: Sequence[Token], value: Mapping[str, Any]) -> Label:
    boxes = [_list(box) for box in _list(value["boxes"])]
    if len(boxes) != len(classes) or not all(len(box) == 4 for box in boxes):
        raise ValueError(f"{len(boxes)} boxes of four numbers and {len(classes)} classes")
    more = {name: _list(value.get(name, [])) for name in ("crowd", "difficult", "area")}
    for name, items in more.items():
        if len(items) not in (0, len(boxes)):
            raise ValueError(f"{len(boxes)} boxes, but {name} of {len(items)}")
    own = value.get("image_id")
    return Label(
        classes,
        [[float(side) for side in box] for box in boxes],
        [_flag(item) for item in more["crowd"]],
        [_flag(item) for item in more["difficult"]],
        [float(item) for item in more["area"]],
        own if isinstance(own, int) and 0 <= own < 2**63 else None,
    )
