"""Which rank hangs, and where: each shows the others that it lives, and what it is doing."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import CodeType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from visiontrain.core.errors import RankError, VisiontrainError
from visiontrain.strategies.environment import Launched
from visiontrain.strategies.stacks import ProcessHandle, StackWriter, innermost

DEPTH = 12  # innermost frames that are shown
LOOK = 2  # intervals in which a rank must show that it lives
BUSY_S = 30.0  # what a busy machine may take to answer
LOST = ("gloo", "pair closure")  # in errors of a collective whose peer is gone
# A main thread in one of these, or one call below, waits for other ranks.
WAITS = ("/torch/distributed/", "/torch/autograd/graph.py")


def is_lost(error: BaseException) -> bool:
    """Tell whether an error is that of a rank whose peer is gone, or does not come."""
    if isinstance(error, VisiontrainError):  # ours, whatever words it has
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in LOST)


@dataclass(frozen=True, slots=True)
class Note:
    """What a rank shows of itself."""

    count: int  # one more each time
    state: str  # `runs`; `waits` at its end, or since it lost another; `failed` by itself
    where: Sequence[str]  # the innermost frames of its main thread, the innermost last
    process: ProcessHandle

    @property
    def waiting(self) -> bool:
        """Tell whether the main thread was where it waits for others."""
        return any(place in line for line in self.where[-2:] for place in WAITS)


UNSEEN = Note(0, "runs", (), ProcessHandle("", 0, 0, "", 0))
Notes = Mapping[int, Note]


@dataclass(frozen=True, slots=True)
class Finding:
    """Which ranks the others waited for; none where each waits for another."""

    ranks: Sequence[int]
    silent: bool  # they showed nothing any more
    notes: Notes


def judge(first: Notes, later: Notes, me: int) -> Finding:
    """Find the ranks that the others wait for.

    Args:
        first: what each rank showed when this one gave up.
        later: the same, some intervals later.
        me: this rank, which waited.
    """
    running = [rank for rank in first if rank != me and first[rank].state == "runs"]
    silent = [rank for rank in running if later[rank].count == first[rank].count]
    away = [rank for rank in running if not first[rank].waiting]
    return Finding(silent or away, bool(silent), first)


class Heartbeat:
    """While entered, a thread shows the other ranks that this one lives, and where it is.

    A rank that runs no Python any more, as it was stopped or hangs in C code with the
    interpreter's lock, falls silent; one that hangs elsewhere shows where. The thread has its
    own connection to the store: the main thread's may be in use.
    """

    def __init__(self, store: dist.Store, told: Launched, timeout_s: float) -> None:
        """Prepare to name what hangs within `timeout_s`, if collectives fail after `wait_s`."""
        self.timeout_s = timeout_s
        self.interval_s = min(max(timeout_s / 10, 0.5), 3.0)
        self.wait_s = max(timeout_s - (LOOK + 1) * self.interval_s, timeout_s / 2)
        self.store, self.told = store, told
        self._stacks = StackWriter()
        self._count, self._state = 0, "runs"
        self._where: Sequence[str] = ()  # where it stays; empty while it moves
        self._rest = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._patience_s = BUSY_S if told.has_agent else LOOK * self.interval_s
        self._first: Note | None = None  # rank 0's last, where the store ends with it

    def __enter__(self) -> Self:
        self._stacks.open()
        self._line = self.store.clone()
        self._post()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.rest()
        self._stacks.close()

    def rest(self) -> None:
        """Show for the last time: that this rank only waits for the others now."""
        if not self._rest.is_set():
            if self._state == "runs":
                self._state, self._where = "waits", ("  its end",)
            self._rest.set()
            self._thread.join(self._patience_s)  # longer only if the store hangs

    def cause(self, error: Exception) -> RankError | None:
        """Name the ranks that hang and thereby caused an error; None where it was no hang.

        Those on this machine are killed: they heed no other signal, and whoever started them
        would wait.
        """
        self._state = "waits" if is_lost(error) else "failed"
        self._where = _lines(_frames_of(error.__traceback__))
        self.rest()
        found = self._look() if is_lost(error) else None
        late = "timed out" in str(error).lower()  # else another rank waited, and ended
        if found is None or not (found.ranks or late):
            return None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, before this is told
        text = self._text(found, f" while the others waited {self.wait_s:g} s" if late else "")
        for rank in found.ranks:
            found.notes[rank].process.kill()
        if not self.told.has_agent and not self.told.rank:
            time.sleep(self.interval_s)  # the others still read the store
        return RankError(text)

    # -- showing ------------------------------------------------------------------

    def _beat(self) -> None:
        with suppress(dist.DistError):  # the store is gone, as the group soon is
            over = False
            while not over:
                over = self._rest.wait(self.interval_s)
                self._post()
                if not self.told.has_agent and self.told.rank:
                    self._first = self._read(0)

    def _post(self) -> None:
        self._count += 1
        where = self._where or _lines(_frames_of(None))
        note = Note(self._count, self._state, where, self._stacks.process)
        self._line.set(f"heartbeat/{self.told.rank}", json.dumps(asdict(note)))

    def _read(self, rank: int) -> Note:
        key = f"heartbeat/{rank}"
        if not self._line.check([key]):
            return UNSEEN
        values: dict[str, Any] = json.loads(self._line.get(key))
        return Note(**values | {"process": ProcessHandle(**values["process"])})

    # -- looking ------------------------------------------------------------------

    def _look(self) -> Finding | None:
        """Judge what the ranks show, in a thread: a store in a process that is stopped hangs."""
        answers: list[Finding | None] = []

        def look() -> None:
            with suppress(dist.DistError):
                answers.append(self._compare())

        looker = threading.Thread(target=look, daemon=True)
        if not self._thread.is_alive():
            looker.start()
            looker.join(BUSY_S)
        if answers:
            return answers[0]
        # The store does not answer: it is stopped, or gone, with rank 0.
        if self._first is not None and self._first.state == "runs":
            return Finding([0], silent=True, notes={0: self._first})
        return None

    def _compare(self) -> Finding | None:
        everybody = range(self.told.world)
        later = first = {rank: self._read(rank) for rank in everybody}
        end = time.monotonic() + LOOK * self.interval_s
        while time.monotonic() < end:
            time.sleep(self.interval_s / 4)
            later = {rank: self._read(rank) for rank in everybody}
            if any(_speaks_for_itself(note) for note in later.values()):
                return None
        return judge(first, later, self.told.rank)

    # -- telling ------------------------------------------------------------------

    def _text(self, found: Finding, waited: str) -> str:
        world = self.told.world
        if not found.ranks:
            lines = [f"ranks of {world}: each waited for another; they were in"]
            for rank, note in found.notes.items():
                lines += [f"rank {rank}:", *note.where]
            return "\n".join(lines)
        lines = []
        for rank in found.ranks:
            note = found.notes[rank]
            where = (found.silent and note.process.stack(DEPTH)) or note.where
            did = "no sign of life" if found.silent else "did not come"
            last = "it was last in" if where else "it had only started"
            lines += [f"rank {rank} of {world}: {did}{waited}; {last}", *where]
        return "\n".join(lines)


def _speaks_for_itself(note: Note) -> bool:
    """Tell whether a rank failed, and says why, or was killed, as its launcher says."""
    return note.state == "failed" or (note.state == "runs" and note.process.is_gone())


Places = Iterable[tuple[CodeType, int | None]]


def _frames_of(trace: TracebackType | None) -> Places:
    """List (code, line) of a traceback, or of where the main thread is, the innermost last."""
    found: list[tuple[CodeType, int | None]] = []
    if trace is None:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None:
            found.insert(0, (frame.f_code, frame.f_lineno))
            frame = frame.f_back
    while trace is not None:
        found.append((trace.tb_frame.f_code, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _lines(places: Places) -> Sequence[str]:
    """Write places as faulthandler does, so that editors find them."""
    frames = [
        f'  File "{code.co_filename}", line {line} in {code.co_qualname}' for code, line in places
    ]
    return innermost(frames, DEPTH)
