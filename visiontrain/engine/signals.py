"""Signals only set a flag; the trainer reads it between steps, saves, and ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

REQUEUE = 75  # sysexits.h: EX_TEMPFAIL, saved and worth starting again
INTERRUPTED = 130
EXIT_CODES = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: REQUEUE,
    signal.SIGUSR1: REQUEUE,
}


class Signals:
    """While entered, SIGTERM, SIGINT and SIGUSR1 are noted instead of ending the process.

    A second SIGINT acts at once. Outside the main thread, where Python takes no signals,
    nothing is installed and `received` stays 0.
    """

    def __init__(self) -> None:
        self.received = 0  # by this process, or by one that it agreed with
        self._interrupted = False  # by a SIGINT of its own
        self._undo = ExitStack()

    @property
    def exit_code(self) -> int:
        """What to return when the run was saved because of the signal; 0 without one."""
        return EXIT_CODES[signal.Signals(self.received)] if self.received else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                old = signal.signal(number, self._note)
                self._undo.callback(signal.signal, number, old)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._undo.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self.received = number


def unsaved(received: int) -> int:
    """Return the exit code of a run that got signal `received` and could not save."""
    return 128 + received


class Halt(KeyboardInterrupt):
    """A signal that came where nothing had to be saved first."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@contextmanager
def halting() -> Iterator[Callable[[], int]]:
    """Let SIGTERM, SIGINT and SIGUSR1 raise `Halt`; yield what tells of those that others took.

    A run, and the launch of its processes, handle signals themselves. One that comes in a run's
    last seconds lets it end as complete, and what is more than one run has to know of it: the
    exit code of the first is returned, 0 without one. Another thread than the main one hears none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    with ExitStack() as undo:
        for number in EXIT_CODES:
            undo.callback(signal.signal, number, signal.signal(number, _halt))
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
            undo.callback(os.close, end)
        # Python writes every signal it handles there, whose ever the handler is.
        undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
        received: list[int] = []

        def heard() -> int:
            with suppress(BlockingIOError):
                received.extend(n for n in os.read(reader, 4096) if n in EXIT_CODES)
            return EXIT_CODES[signal.Signals(received[0])] if received else 0

        yield heard


def _halt(number: int, frame: FrameType | None) -> None:
    del frame
    raise Halt(EXIT_CODES[signal.Signals(number)])
