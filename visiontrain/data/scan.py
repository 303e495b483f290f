"""Sizes and visible damage of many image files, read once and remembered."""

from __future__ import annotations

import errno
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b, sha256
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from visiontrain.data.atomic import replace_file
from visiontrain.data.header import ImageError, read_header
from visiontrain.data.images import Paths, StoredImages, decode, is_decodable
from visiontrain.data.table import Defect

VERSION = 4  # of what is checked; a change makes remembered scans void
LASTING = {errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}  # of the path itself
REMEMBERED = 1000  # images from which a scan is worth a file in the cache
SMALLEST = 10  # shortest side of a usable image, pixels
THREADS = 8  # they wait for storage, not for the processor
TAIL = 64  # bytes at the end of a file in which its end marker is looked for
END = b"\xff\xd9"  # JPEG's end of image


@dataclass(frozen=True, slots=True)
class Scan:
    """What the headers of N images say."""

    sizes: NDArray[np.int32]  # (N, 2): width, height as shown; zeros where unusable
    defects: tuple[Defect, ...]

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Return which images can be used (N,)."""
        return self.sizes[:, 0] > 0


@dataclass(frozen=True, slots=True)
class Found:
    """What one header says."""

    size: tuple[int, int] = (0, 0)
    defect: Defect | None = None
    passing: bool = False  # an error of the system, which says nothing of the file


def scan(paths: Paths, max_pixels: int, cache: Path) -> Scan:
    """Look at every file's header and end; results for many files are kept in `cache`.

    A JPEG whose end marker is missing is decoded, to tell a truncated picture from a complete
    one. A kept result is used while no file's path, size or time of change differs.
    """
    kept = cache / f"{fingerprint(paths, max_pixels, VERSION)}.scan"
    remembered = _load(kept) if len(paths) >= REMEMBERED else None
    if remembered is not None:
        return remembered
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda path: look(path, max_pixels), paths, chunksize=64))
    result = Scan(
        sizes=np.array([item.size for item in found], np.int32).reshape(-1, 2),
        defects=tuple(item.defect for item in found if item.defect is not None),
    )
    if len(paths) >= REMEMBERED and not any(item.passing for item in found):
        _save(kept, result)
    return result


def fingerprint(paths: Paths, *key: object) -> str:
    """Hash the paths, sizes and times of change of files, and `key`."""
    digest = blake2b(repr(key).encode(), digest_size=16)
    for path in paths:
        try:
            status = os.stat(path)  # noqa: PTH116 - a tenth of the time of making a Path
            digest.update(
                f"{path}\0{status.st_size} {status.st_mtime_ns}\n".encode(
                    "utf-8", "surrogateescape"
                )
            )
        except (OSError, ValueError):  # the latter at a NUL in the path
            digest.update(f"{path}\0missing\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def look(path: str, max_pixels: int) -> Found:
    """Judge one file."""
    if "\0" in path:  # no OSError: Python does not even ask
        return Found(defect=Defect(path, None, "missing-image", "no such file: its name has a NUL"))
    try:
        return _look(path, max_pixels)
    except ImageError as error:
        return Found(defect=Defect(path, None, error.kind, error.reason))
    except FileNotFoundError:
        return Found(defect=Defect(path, None, "missing-image", "no such file"))
    except OSError as error:
        reason = f"cannot be read ({error})"
        passing = error.errno not in LASTING
        return Found(defect=Defect(path, None, "corrupt-image", reason), passing=passing)


def _look(path: str, max_pixels: int) -> Found:
    with Path(path).open("rb") as file:
        return look_into(file, path, max_pixels)


def look_into(file: BinaryIO, name: str, max_pixels: int) -> Found:
    """Judge an open file.

    Raises:
        ImageError: it cannot be used.
    """
    head = read_header(file, name, max_pixels)
    file.seek(0, io.SEEK_END)
    file.seek(max(0, file.tell() - TAIL))
    complete = head.format != "jpeg" or END in file.read()
    if min(head.size) < SMALLEST:
        reason = f"{head.size[0]} x {head.size[1]}; a side is shorter than {SMALLEST} pixels"
        raise ImageError(name, "tiny-image", reason)
    defect = None
    if not complete:
        file.seek(0)
        defect = _judge_end(file.read(), name, max_pixels)
    return Found(head.size, defect)


def _judge_end(data: bytes, path: str, max_pixels: int) -> Defect | None:
    """Decode a JPEG without an end marker in its last bytes; raise when it is truncated."""
    decode(data, path, max_pixels)
    if not is_decodable(data):
        return Defect(path, None, "missing-end", "a JPEG without its end marker; it is used")
    return None  # something else follows the picture, as some phones write


def decode_all(source: StoredImages) -> None:
    """Decode every image, keeping none.

    Raises:
        ImageError: Of the first image that cannot be decoded.
    """

    def attempt(row: int) -> None:
        source.read(row)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(attempt, range(len(source))):
            pass  # an error is raised here, in the order of the images


def _save(kept: Path, result: Scan) -> None:
    defects = json.dumps([[d.file, d.line, d.kind, d.reason] for d in result.defects])
    buffer = io.BytesIO()
    text = np.frombuffer(defects.encode(), np.uint8)
    np.savez_compressed(buffer, sizes=result.sizes, defects=text)
    data = buffer.getvalue()
    replace_file(kept, sha256(data).digest() + data)


def _load(kept: Path) -> Scan | None:
    """Return a remembered scan; None when there is none, or it is damaged."""
    try:
        data = kept.read_bytes()
    except OSError:
        return None
    if sha256(data[32:]).digest() != data[:32]:
        return None
    with np.load(io.BytesIO(data[32:]), allow_pickle=False) as arrays:
        rows = json.loads(arrays["defects"].tobytes())
        return Scan(arrays["sizes"], tuple(Defect(*row) for row in rows))
