"""Writing beside training: jobs in order, in a thread or at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

Job = Callable[[], object]


class Writer:
    """Runs what writes files, one after another; `wait` for a job before the next of its kind.

    A thread for each job, which ends with it: loaders are forks, and should find none.
    """

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._done: dict[str, Future[object]] = {}
        self._last: Thread | None = None

    def start(self, kind: str, job: Job) -> None:
        """Run `job` here, or let a thread do so after the jobs before it."""
        before, done = self._last, Future[object]()
        self._done[kind] = done

        def run() -> None:
            if before is not None:
                before.join()
            try:
                done.set_result(job())
            except BaseException as error:  # noqa: BLE001 - `wait` raises it where it is heard
                done.set_exception(error)

        if self.background:
            # A daemon: a second Ctrl-C must not wait for a disk.
            self._last = Thread(target=run, name=f"save {kind}", daemon=True)
            self._last.start()
        else:
            run()

    def wait(self, kind: str) -> None:
        """Wait until the last job of a kind has written; raise what it raised."""
        if kind in self._done:
            self._done.pop(kind).result()

    def pending(self, kind: str) -> Future[object] | None:
        """Return the last job of a kind that nobody has waited for yet."""
        return self._done.get(kind)

    def rest(self) -> None:
        """Wait until no thread is left; what they raised is kept for `wait`."""
        if self._last is not None:
            self._last.join()
            self._last = None
