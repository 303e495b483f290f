"""Files at URLs: copied whole into a folder of bounded size when they are first read."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

from visiontrain.core.errors import ConfigError, FetchError
from visiontrain.core.explain import short
from visiontrain.data.atomic import written

TRIES = 3
PAUSE_S = 1.0  # before the second try; twice as long before each later one
STALE_S = 86_400  # age from which an unfinished copy is nobody's any more
GB = 10**9
FULL = {errno.ENOSPC, errno.EDQUOT}
CHUNK = 1 << 20  # bytes copied at a time
ATTEMPTS = 100  # at a copy that others may remove before it is opened
LONGEST = 50  # characters of a copy's name; with 4 bytes each, a hash and a suffix still fit


class TooLongError(FetchError):
    """A file at a URL has more bytes than it may: to try again would change nothing."""


def is_remote(place: str) -> bool:
    """Tell a URL from a path."""
    return "://" in place


def file_name(place: str) -> str:
    """Return the last part of a path or URL; a URL's query (a signature) is no part of it."""
    plain = place.partition("?")[0] if is_remote(place) else place
    return plain.rsplit("/", 1)[-1]


class ShardStore:
    """Where files lie locally: paths as they are, URLs as copies.

    A copy appears complete or not at all, and processes that want the same one wait for the first.
    Its time of change is that of its last use; the longest unused go first.
    """

    def __init__(self, folder: Path, limit_gb: float, pause_s: float = PAUSE_S) -> None:
        self.folder = folder / "shards"
        self.limit = int(limit_gb * GB)
        self.pause_s = pause_s
        self.indices: dict[str, str] = {}  # tar at a URL -> what is kept here of its index

    def note_index(self, tars: Iterable[str], kept: Path) -> None:
        """Remember what to delete when tars at URLs are no longer those that were indexed."""
        self.indices |= {tar: str(kept) for tar in tars if is_remote(tar)}

    def open(self, place: str, size: int | None = None) -> int:
        """Return a descriptor of a file's content, which stays when its copy is removed.

        Raises:
            FetchError: the URL cannot be read, or its copy was removed each time.
            OSError: the path cannot be read.
        """
        for _ in range(ATTEMPTS):
            try:
                return os.open(self.local(place, size), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:  # a copy that had to make room just now
                if not is_remote(place):
                    raise
        raise FetchError(
            f"{place}: its copy was removed {ATTEMPTS} times before it was read; raise "
            "data.shard_cache_gb"
        )

    def local(self, place: str, size: int | None = None) -> str:
        """Return the path of a file's content; a copy may vanish later: then ask again.

        Args:
            place: a path or a URL.
            size: bytes that the file must have, where that is known.

        Raises:
            FetchError: the URL cannot be read, or has other than `size` bytes or more than the
                limit.
        """
        if not is_remote(place):
            return place
        copy = self._copy(place)
        if _is_whole(copy, size):
            with suppress(OSError):
                os.utime(copy)
                return str(copy)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _alone(self.folder / f".{copy.name}.lock"):
                if not _is_whole(copy, size):
                    self._make_room(size or 0, copy)
                    self._fetch(place, copy, size)
                    self._make_room(0, copy)
        except OSError as error:
            raise FetchError(
                f"{self.folder}: cannot hold a copy of {place} ({error.strerror or error}); make "
                "room, or set data.cache_dir"
            ) from error
        return str(copy)

    def _copy(self, place: str) -> Path:
        key = blake2b(place.encode(), digest_size=8).hexdigest()
        return self.folder / f"{key}-{file_name(place)[-LONGEST:]}"

    def _fetch(self, place: str, copy: Path, size: int | None) -> None:
        most = self.limit if size is None else size
        try:
            length = self._download(place, copy, most, TRIES)
        except TooLongError as error:
            if size is not None:
                raise self._other_size(place, f"more than {size:,}", size) from error
            raise TooLongError(
                f"{place}: has more than {most:,} bytes; raise data.shard_cache_gb"
            ) from error
        if size is not None and length != size:
            copy.unlink(missing_ok=True)
            raise self._other_size(place, f"{length:,}", size)

    def _other_size(self, place: str, got: str, size: int) -> FetchError:
        """Say that a tar is not the one that was indexed."""
        kept = self.indices.get(place)
        found = kept is not None and Path(kept).is_file()
        advice = f"delete {kept}, where that is kept" if found else "index it anew"
        return FetchError(f"{place}: has {got} bytes, its index says {size:,}; {advice}")

    def _download(self, place: str, copy: Path, most: int, tries: int) -> int:
        try:
            return _download(place, copy, most)
        except TooLongError:
            raise
        except FetchError:
            if tries == 1:
                raise
        time.sleep(self.pause_s * 2 ** (TRIES - tries))
        return self._download(place, copy, most, tries - 1)

    def _make_room(self, wanted: int, kept: Path) -> None:
        """Remove the copies unused for longest until `wanted` bytes more fit."""
        copies = []
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):  # another process removes, too
                status = path.stat()
                if not path.name.startswith("."):
                    copies.append((status.st_mtime, status.st_size, path))
                elif path.suffix != ".lock" and time.time() - status.st_mtime > STALE_S:
                    path.unlink()
        total = wanted + sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size


def _is_whole(copy: Path, size: int | None) -> bool:
    """Tell whether there is a copy, and of `size` bytes: what lies at a URL may have changed."""
    try:
        found = copy.stat().st_size
    except OSError:
        return False
    return size is None or found == size


def _download(place: str, copy: Path, most: int) -> int:
    """Copy a file of at most `most` bytes; return how many it has.

    Raises:
        ConfigError: what reads URLs is not installed, or does not read this one.
        TooLongError: it has more.
        FetchError: it cannot be read.
    """
    try:
        import fsspec  # noqa: PLC0415 - an extra
    except ImportError:
        raise ConfigError(
            f"{place}: URLs are read by fsspec; pip install 'visiontrain[remote]', or give a path"
        ) from None
    if "::" in place:
        raise ConfigError(f"{place}: a chain of URLs; give a single one")
    try:
        with cast("Any", fsspec.open(place, "rb")) as source, written(copy) as file:
            _copy_at_most(most, source, file)
            return file.tell()
    except TooLongError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and _is_ours(error, copy):
            raise
        reason = short(f"{type(error).__name__}: {error}")
        raise FetchError(
            f"{place}: cannot be fetched ({reason}); check the address, access and the network"
        ) from error


def _copy_at_most(most: int, source: BinaryIO, file: BinaryIO) -> None:
    while chunk := source.read(CHUNK):
        if file.tell() + len(chunk) > most:
            raise TooLongError(f"more than {most:,} bytes")
        file.write(chunk)


def _is_ours(error: OSError, copy: Path) -> bool:
    """Tell a folder of ours that cannot be written from a file that cannot be read."""
    return error.errno in FULL or str(error.filename).startswith(str(copy.parent))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one thread of one process at a time in; where files cannot be locked, all of them."""
    with path.open("w") as file:
        # Not lockf, which knows processes only: threads read shards, too.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a fork may hold the file open
