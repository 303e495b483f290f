"""What other processes on a machine can learn of one that hangs, and how they end it."""

from __future__ import annotations

import faulthandler
import os
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

WRITING_S = 1.0  # for a process to write where it is
PACKAGE = f'"{Path(__file__).parents[1]}{os.sep}'  # in frames of ours
FRAME = re.compile(r'  File ".*", line \d+ in ')


@dataclass(frozen=True, slots=True)
class ProcessHandle:
    """A process, as others on its machine find it."""

    machine: str  # empty where nothing can be found
    pid: int
    file: int  # the descriptor of the file that SIGUSR2 makes it write its stacks into
    token: str  # the first line of that file
    thread: int  # the main one

    def is_gone(self) -> bool:
        """Tell whether it surely runs no more; False where it lies on another machine."""
        return self._is_here() and self._open() is None

    def stack(self, depth: int) -> Sequence[str]:
        """Make it write the innermost frames of its main thread; none where it can't.

        It ends by that.
        """
        file = self._open()
        if file is None:
            return ()
        with file, suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR2)
            os.kill(self.pid, signal.SIGCONT)  # one that is stopped writes before it goes on
            end, text = time.monotonic() + WRITING_S, ""
            while time.monotonic() < end:
                time.sleep(WRITING_S / 10)
                more = file.read().decode(errors="replace")
                if text and not more:
                    break
                text += more
            return self._main_thread(text, depth)
        return ()

    def kill(self) -> None:
        """End it, if it runs here."""
        file = self._open()
        if file is not None:
            with file, suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _main_thread(self, text: str, depth: int) -> Sequence[str]:
        for part in text.split("\n\n"):
            title, *lines = part.strip("\n").splitlines() or [""]
            if re.search(rf"hread 0x0*{self.thread:x}\b", title):
                return innermost([line for line in lines if FRAME.match(line)][::-1], depth)
        return ()

    def _is_here(self) -> bool:
        return bool(self.machine) and self.machine == _machine()

    def _open(self) -> IO[bytes] | None:
        """Open the file, which proves that this is the process: None where it is not."""
        if not self._is_here():
            return None
        try:
            path = Path(f"/proc/{self.pid}/fd/{self.file}")
            file = path.open("rb", buffering=0)
        except OSError:
            return None
        if file.readline().decode(errors="replace").strip() == self.token:
            return file
        file.close()
        return None


def innermost(frames: Sequence[str], depth: int) -> Sequence[str]:
    """Return the last `depth` frames; where they are all a library's, the last of ours before."""
    last = frames[-depth:]
    ours = [frame for frame in frames if PACKAGE in frame]
    return last if not ours or set(ours) & set(last) else [ours[-1], *last]


class StackWriter:
    """Lets others on this machine find this process, and see where it is when it hangs.

    SIGUSR2 then does what it did before, by default end the process, but not before the stacks
    of all threads were written into a file without a name. That needs no Python to run.
    """

    process: ProcessHandle

    def open(self) -> None:
        """Begin."""
        self._file = tempfile.TemporaryFile("ab", buffering=0)  # noqa: SIM115 - `close` does
        token = secrets.token_hex(8)
        self._file.write(f"{token}\n".encode())
        faulthandler.register(signal.SIGUSR2, self._file, chain=True)
        thread = threading.main_thread().ident or 0
        self.process = ProcessHandle(_machine(), os.getpid(), self._file.fileno(), token, thread)

    def close(self) -> None:
        """End."""
        faulthandler.unregister(signal.SIGUSR2)
        self._file.close()


def _machine() -> str:
    """Name this machine, or the part of it in which process ids mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # macOS
        return ""
