"""The size, format and EXIF orientation of an image, from its first bytes: nothing is decoded.

Own parsers instead of PIL's lazy open, which is ten times slower per image, decodes a whole
PNG to find its EXIF, and warns or refuses by limits of its own.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from visiontrain.core.errors import DataError

SUFFIXES = frozenset(
    {".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp"}
)
OTHER_SUFFIXES = frozenset(  # pictures that are not read
    {".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".pbm", ".pgm", ".pnm", ".ppm"}
)
ORIENTATION = 0x0112  # EXIF's tag: 1 upright, 2 to 8 the other seven, 5 to 8 swap the sides


class ImageError(DataError):
    """An image that cannot be used; `kind` is a key of `data.defects.DEFECTS`."""

    def __init__(self, where: str, kind: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.kind = kind
        self.reason = reason


class EndsEarlyError(ValueError):
    """A chunk reaches past the end of the file, or the last one is missing."""


@dataclass(frozen=True, slots=True)
class Header:
    """What an image file says of itself."""

    format: str
    width: int  # as stored
    height: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """Return (width, height) as shown, after rotation."""
        if self.orientation >= 5:
            return self.height, self.width
        return self.width, self.height


def read_header(file: BinaryIO, where: str, max_pixels: int) -> Header:
    """Read the header of an open image file.

    Raises:
        ImageError: The format is unknown, the header is cut off or makes no sense, or the
            image has more than `max_pixels`.
    """
    start = file.read(12)
    if not start:
        raise ImageError(where, "corrupt-image", "the file is empty")
    parse = next((PARSERS[magic] for magic in PARSERS if start.startswith(magic)), None)
    if parse is None:
        reason = f"starts with {start[:4]!r}; JPEG, PNG, BMP, TIFF and WebP are read"
        raise ImageError(where, "unknown-format", reason)
    try:
        header = parse(file)
    except EndsEarlyError as error:
        raise ImageError(where, "truncated-image", "the file ends before its picture") from error
    except (struct.error, LookupError, ValueError) as error:
        reason = f"the image header is damaged or cut off ({error!r})"
        raise ImageError(where, "corrupt-image", reason) from error
    if header.width < 1 or header.height < 1:
        raise ImageError(where, "corrupt-image", "the header says the image has no pixels")
    if header.width * header.height > max_pixels:
        reason = (
            f"{header.width} x {header.height} is more than max_pixels={max_pixels}; "
            "raise it if this is no accident"
        )
        raise ImageError(where, "huge-image", reason)
    return header


def _unpack(layout: str, file: BinaryIO) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))


def _jpeg(file: BinaryIO) -> Header:
    """Walk the segments up to the frame header."""
    orientation = 1
    file.seek(2)
    while True:
        (byte,) = _unpack("B", file)
        if byte != 0xFF:
            raise ValueError("no marker where one belongs")
        while byte == 0xFF:  # any number of fill bytes
            (byte,) = _unpack("B", file)
        if byte == 0x01 or 0xD0 <= byte <= 0xD8:  # markers without a segment
            continue
        if byte in (0xD9, 0xDA):
            raise ValueError("no frame header")
        (length,) = _unpack(">H", file)
        after = file.tell() + length - 2
        if 0xC0 <= byte <= 0xCF and byte not in (0xC4, 0xC8, 0xCC):
            _, height, width = _unpack(">BHH", file)
            return Header("jpeg", width, height, orientation)
        if byte == 0xE1 and orientation == 1 and length > 8:
            orientation = _exif(file.read(length - 2).removeprefix(b"Exif\0\0"))
        file.seek(after)


def _png(file: BinaryIO) -> Header:
    """Walk all chunks: OpenCV would allocate whatever length a damaged one claims."""
    size = file.seek(0, io.SEEK_END)
    file.seek(8)
    _, name, width, height = _unpack(">I4sII", file)
    if name != b"IHDR":
        raise ValueError("no IHDR")
    file.seek(33)
    orientation = 1
    while name != b"IEND":
        chunk = file.read(8).ljust(8, b"\xff")  # at the end of the file: one that is too long
        length, name = struct.unpack(">I4s", chunk)
        after = file.tell() + length + 4
        if after > size:
            raise EndsEarlyError
        if name == b"eXIf":
            orientation = _exif(file.read(length))
        file.seek(after)
    return Header("png", width, height, orientation)


def _bmp(file: BinaryIO) -> Header:
    file.seek(14)
    (kind,) = _unpack("<I", file)
    width, height = _unpack("<HH" if kind == 12 else "<ii", file)
    return Header("bmp", width, abs(height))  # a negative height stores from the top


def _webp(file: BinaryIO) -> Header:
    file.seek(8)
    if file.read(4) != b"WEBP":
        raise ValueError("RIFF, but not WebP")
    name, length = struct.unpack("<4sI", file.read(8))
    if name == b"VP8 ":
        _, width, height = _unpack("<6sHH", file)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    if name == b"VP8L":
        _, bits = _unpack("<BI", file)
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if name != b"VP8X":
        raise ValueError("no VP8 chunk")
    body = file.read(10)
    width = int.from_bytes(body[4:7], "little") + 1
    height = int.from_bytes(body[7:10], "little") + 1
    file.seek(20 + length)
    for chunk in _riff(file):
        if chunk[0] == b"EXIF":
            return Header(
                "webp", width, height, _exif(file.read(chunk[1]).removeprefix(b"Exif\0\0"))
            )
    return Header("webp", width, height)


def _riff(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield the name and length of each chunk; the file stands at its body."""
    while len(head := file.read(8)) == 8:
        name, length = struct.unpack("<4sI", head)
        after = file.tell() + length + length % 2
        yield name, length
        file.seek(after)


def _tiff(file: BinaryIO) -> Header:
    tags = _ifd(file)
    return Header("tiff", tags[256], tags[257], _valid(tags.get(ORIENTATION, 1)))


def _ifd(file: BinaryIO) -> dict[int, int]:
    """Return the whole-number tags of the first directory of a TIFF.

    Of a tag that comes twice the first counts, as for libtiff: a second size must not hide the
    one that is decoded.
    """
    file.seek(0)
    order = {b"II": "<", b"MM": ">"}[file.read(2)]
    version, offset = _unpack(f"{order}HI", file)
    if version != 42:
        raise ValueError("not a classic TIFF")
    file.seek(offset)
    (count,) = _unpack(f"{order}H", file)
    tags: dict[int, int] = {}
    seen: set[int] = set()
    for _ in range(count):
        entry = file.read(12)
        tag, kind, _ = struct.unpack(f"{order}HHI", entry[:8])
        if kind in (3, 4) and tag not in seen:  # SHORT, LONG
            (tags[tag],) = struct.unpack(
                order + " HI"[kind - 2], entry[8 : 10 if kind == 3 else 12]
            )
        seen.add(tag)
    return tags


def _exif(data: bytes) -> int:
    """Return the orientation in an EXIF block; 1 where it is absent or damaged."""
    try:
        return _valid(_ifd(io.BytesIO(data)).get(ORIENTATION, 1))
    except (struct.error, KeyError, ValueError):
        return 1  # as every viewer does


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


PARSERS = {
    b"\xff\xd8\xff": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"RIFF": _webp,
    b"BM": _bmp,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
}
