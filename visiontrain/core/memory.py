"""Memory of this process: kept for the next step, which asks for the same again; measured."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux

# glibc's malloc.h: which parameter, and its value while a run goes on, then the default.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**28}
USUAL = {MMAP_MAX: 65536, TRIM_THRESHOLD: 2**17, TOP_PAD: 2**17}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep what is freed while this is entered, and give it back afterwards.

    By default large blocks go back to the system when they are freed, and each step of a training
    on the CPU spends a fifth of its time on getting zeroed pages again (DECISIONS.md, 13).
    Where the C library is another one, nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    for parameter, value in KEEP.items():
        libc.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def forget_peak() -> None:
    """Let `peak_rss_mb` begin anew, where the system can: what ran here before is not counted."""
    with suppress(OSError):
        CLEAR.write_text("5")  # proc(5): resets the peak alone


def resident() -> int:
    """Return the bytes of memory that this process holds now; where nothing tells, the most."""
    with suppress(OSError):
        found = [line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:")]
        if found:
            return int(found[0].split()[1]) * 2**10
    return round(peak_rss_mb() * 2**20)


def peak_rss_mb() -> float:
    """Return the most memory this process held at once, in MB, since `forget_peak` if it could.

    Not getrusage's figure on Linux: there a process begins with the peak of the one that
    started it.
    """
    with suppress(OSError):
        found = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0].split()[1]) / 2**10
    units = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units
