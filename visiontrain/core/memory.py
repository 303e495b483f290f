"""Keeping freed memory for the next step, which asks for the same again."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

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
