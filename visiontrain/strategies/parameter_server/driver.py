"""The process that the user started: it scores, saves and watches while others train."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.errors import RankError
from visiontrain.core.interfaces import StateDict, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.data.loader import Step
from visiontrain.strategies import config as settings
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.member import error_again
from visiontrain.strategies.parameter_server.calls import Calls, LostServerError
from visiontrain.strategies.parameter_server.engine import (
    Engine,
    Event,
    HubEnded,
    ServerEnded,
    WorkerEnded,
)
from visiontrain.strategies.parameter_server.figures import Totals
from visiontrain.strategies.parameter_server.parts import is_held, parts_of, trained_in
from visiontrain.strategies.parameter_server.rules import shares_of
from visiontrain.strategies.parameter_server.shard import flat
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import Schema, pack, unpack

_tell = logging.getLogger(__name__).warning


@dataclass(slots=True)
class Segment:
    """Steps between two times when everything rests: to score, to save."""

    steps: Sequence[Step]
    samples: int = -1  # seen before it; -1 until it begins
    taken: int = 0  # results that the trainer has
    end: int | None = None  # results there will be, once it is cut short


class Driver(Strategy):
    """One device's learner, whose steps are made elsewhere.

    The servers hold the truth while a segment runs; this process's tensors are brought up to
    date when it is over, and are what is scored, saved and loaded.
    """

    def __init__(
        self,
        place: Place,
        precision: Precision,
        config: settings.ParameterServer,
        engine: Engine,
        remote: Remote,
    ) -> None:
        super().__init__(place, precision)
        self.config, self.engine, self.remote = config, engine, remote
        self.calls = Calls(engine, self._see_to)
        self.workers = [f"worker {n}" for n in range(config.processes)]
        self.totals = Totals()  # of the whole run, but for what the current segment did
        self._recent = Totals()  # of the epoch
        self._began = 0.0  # when the segment did
        self._learner: Updatable
        self._segment: Segment | None = None
        self._next: list[Step] = []  # of the segment that is to begin
        self._loaded = False  # whether servers were given what this process has
        self._fetched = True  # whether this process has what servers made of it
        self._met = False  # whether a worker came that can begin
        self._restarts = 0
        self._era = 0
        self._norm = 0.0
        # How far this process's tensors have come: version, step, samples.
        self._position = {"version": 0, "step": 0, "samples": 0}
        self._looks = False  # for workers that hang
        self._dead: set[int] = set()  # servers that have to be brought back
        self._recovers = False
        self._recoveries = 0

    @property
    def shares(self) -> int:
        return shares_of(self.config)

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        self.remote.parts = parts_of(model, self.config.servers)

    def scatter(self, whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        super().scatter(whole, into)
        self._loaded, self._fetched = False, True  # this process knows better now

    def sync_buffers(self, model: VisionModel) -> None:
        del model
        self._fetch()

    def collect(self, tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> StateDict:
        self._fetch()
        return super().collect(tensors, everywhere=everywhere)

    # -- the run ------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Have servers and workers while a run goes on."""
        scratch = self.remote.scratch or Path(tempfile.mkdtemp(prefix="visiontrain-"))
        self.remote.scratch = scratch
        try:
            self.engine.open(self.config.sync, self.config.staleness, self.shares)
            for number in range(self.config.servers):
                self.engine.start_server(number)
            for name in self.workers:
                self.engine.start_worker(name)
            yield
            self.calls.hub("end")
        finally:
            self.engine.close()
            shutil.rmtree(scratch, ignore_errors=True)

    def steps(
        self,
        local: Callable[[], Iterator[Step]],
        blank: Callable[[], Iterator[Step]],
        rests: Callable[[int], bool],
    ) -> Iterator[Step]:
        """Yield steps without images: workers read those."""
        del local
        self._segment, self._next = None, []
        for step in blank():
            self._next.append(step)
            if rests(step.step):
                yield from self._begin()
        yield from self._begin()

    def _begin(self) -> Sequence[Step]:
        """Make a segment of the steps that were noted."""
        steps, self._next = self._next, []
        if steps:
            self._segment = Segment(steps)
        return steps

    # -- the step -----------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """Wait until workers have made as many gradients as a step has."""
        del micro_batches
        self._learner, segment = learner, self._segment
        assert segment is not None
        if segment.samples < 0:
            self._open(segment)
        result = self.calls.hub("result", segment.taken)
        segment.taken += 1
        if segment.taken == (segment.end or len(segment.steps)):
            self._count()
        self._norm = result["norm"]
        if self.remote.traced:
            self._fetch_gradients()
        kind = self.precision.weights
        terms = {n: torch.tensor(result["terms"][n], dtype=kind) for n in learner.task.terms}
        counts = {n: torch.tensor(result["counts"][n], dtype=kind) for n in learner.task.heads}
        return self.mean(Loss(terms, counts))

    def apply(self, learner: Updatable) -> Tensor:
        """Note what the servers did."""
        norm = torch.tensor(self._norm, dtype=self.precision.weights)
        learner.note(norm)
        return norm

    def any(self, *, flag: bool) -> bool:
        """Tell so when all that workers have begun is done: nothing is thrown away."""
        segment = self._segment
        if not flag or segment is None or segment.samples < 0:
            return flag
        if segment.end is None:
            segment.end = self.calls.hub("close")
            if segment.taken == segment.end < len(segment.steps):
                self._count()
        return segment.taken >= segment.end

    def _open(self, segment: Segment) -> None:
        """Begin a segment, from what this process holds."""
        began = time.monotonic()
        self._fetch()
        learner, segment.samples = self._learner, self._learner.samples
        if not self._loaded:
            self._era = self.calls.hub("stop_era")
        version = self.calls.hub("updates")
        self._position = {"version": version, "step": learner.step, "samples": learner.samples}
        if not self._loaded:
            self._load_all()
        self._fetched = False
        self.calls.hub("open", [step.step for step in segment.steps], segment.samples)
        if not self._met:  # by now who hangs is seen
            self.calls.hub("ready")
            self._met, self.starting = True, time.monotonic() - began
        self._began = time.monotonic()

    # -- state --------------------------------------------------------------------

    def _held(self, number: int) -> dict[str, Tensor]:
        """Return this process's tensors that a server holds."""
        names = frozenset(self.remote.parts[number])
        state = flat(self._learner.tensors())
        return {key: tensor for key, tensor in state.items() if is_held(key, names)}

    def _load_all(self) -> None:
        """Give all servers what this process holds."""
        again = True
        while again:  # when one dies while that is done
            self._dead = set()
            for number in range(self.config.servers):
                self._load(number)
                self.engine.publish(number)
            again = bool(self._dead)
        self._loaded = True

    def _load(self, number: int) -> None:
        held = self._held(number)
        message = pack(Schema.of(held), held, {})
        self.calls.insist(number, "load", message, self._position, self._era)

    def _fetch(self) -> None:
        """Bring this process's tensors up to date, if others have trained since."""
        if self._fetched:
            return
        everybody, before = range(self.config.servers), -1
        messages: list[Any] = []
        lines: list[str] = []
        version = 0
        while before != self._recoveries:  # anew when servers went back meanwhile
            before = self._recoveries
            version = self.calls.hub("finished")
            with suppress(LostServerError):
                messages = [self.calls.server(number, "state") for number in everybody]
                lines += [line for n in everybody for line in self.calls.server(n, "forget")]
        for number, message in enumerate(messages):
            held = self._held(number)
            tensors, _ = unpack(message, Schema.of(held), copy=False)
            super().scatter(tensors, held)
        for line in lines:
            _tell(line)
        learner, self._fetched = self._learner, True
        self._position = {"version": version, "step": learner.step, "samples": learner.samples}

    def _fetch_gradients(self) -> None:
        """Show the gradients of the last update where one device has them."""
        for number, names in enumerate(self.remote.parts):
            held = trained_in(self._learner, names)
            message = self.calls.insist(number, "gradients")
            for name, gradient in unpack(message, Schema.of(held))[0].items():
                held[name].grad = gradient.to(held[name].device)

    def gather(self, rows: Tensor) -> Tensor:
        """Add what workers told of the images they saw, once if they were seen again."""
        seen = sorted({tuple(row) for row in self.totals.rows})
        told = torch.tensor(seen, dtype=rows.dtype).reshape(-1, rows.shape[1])
        return torch.cat([rows, told])

    # -- faults -------------------------------------------------------------------

    def _see_to(self, event: Event) -> None:
        if isinstance(event, WorkerEnded):
            self._restart(event.name, event.report)
            self.engine.start_worker(event.name)
        elif isinstance(event, ServerEnded):
            self._restart(f"server {event.number}", event.report)
            self.engine.start_server(event.number)
            self._dead.add(event.number)
            self._recover()
        elif isinstance(event, HubEnded):
            raise RankError(
                "hub: ended without a word; was it killed? Go on from the last checkpoint with "
                "resume=true"
            )
        elif not self._looks:
            self._looks = True
            for name in self.calls.hub("overdue", self.config.timeout_s):
                _tell(f"{name}: at one share of a step for {self.config.timeout_s:g} s; killed")
                self.engine.kill_worker(name)
            self._looks = False

    def _restart(self, who: str, report: Mapping[str, Any] | None) -> None:
        """Count a fault.

        Raises:
            VisiontrainError: one that the user has to see to, or one too many.
        """
        error = RankError(f"{who}: ended without a word; was it killed?")
        if report is not None:
            error = error_again(dict(report), who)
            if not isinstance(error, RankError) or error.lasting:
                raise error
        self._restarts += 1
        self.totals.restarts += 1
        if self._restarts > self.config.max_restarts:
            raise error
        _tell(f"restart {self._restarts} of {self.config.max_restarts}, as {error}")

    def _recover(self) -> None:
        """Bring servers back; all over again, when others die while that is done."""
        if self._recovers or not self._loaded:
            return  # what is not loaded yet will be
        self._recovers = True
        try:
            while self._dead:
                dead, self._dead = self._dead, set()
                self._recoveries += 1
                self._bring_back(dead)
        finally:
            self._recovers = False

    def _bring_back(self, dead: set[int]) -> None:
        """Give new servers the weights of those that died.

        Where an update takes gradients of all, all servers go back to one update, and what came
        after it is computed again: nothing is lost. Elsewhere this one alone does, and the
        gradients that were under way are made again.
        """
        if self._fetched:
            self._load_all()
            return
        if self.config.sync == "bsp":
            self._go_back()
            return
        self._era = self.calls.hub("abandon")
        for other in range(self.config.servers):
            self.calls.insist(other, "turn", self._era)
        for number in sorted(dead):
            at, updates = self._position["version"], self.calls.hub("updates")
            versions = self.calls.insist(number, "versions")
            known = [version for version in versions if at < version <= updates]
            if known:
                at = self.calls.insist(number, "restore", known[-1], self._era)["version"]
            else:
                self._load(number)
            self.engine.publish(number)
            self.totals.lost += updates - at
            _tell(
                f"server {number}: back at update {at}, without the {updates - at} that came "
                "after it"
            )

    def _go_back(self) -> None:
        """Let all servers go back to the newest update that all of them can go back to."""
        before = self.calls.hub("updates")
        self._era = self.calls.hub("stop_era")
        everybody = range(self.config.servers)
        common = set.intersection(*(set(self.calls.insist(n, "versions")) for n in everybody))
        start, position = self._position, self._position
        # Not one that the hub has not heard of: its loss would be missing.
        known = [v for v in common if start["version"] < v <= before]
        newest = max(known, default=None)
        if newest is None:
            self._load_all()
        else:
            for number in everybody:
                position = self.calls.insist(number, "restore", newest, self._era)
                self.engine.publish(number)
        done = position["version"] - start["version"]
        self.calls.hub("rewind", done, position["samples"], position["version"])
        _tell(
            f"servers: back at update {position['version']}; {before - position['version']} that "
            "came after it are computed again"
        )

    # -- figures ------------------------------------------------------------------

    def _count(self) -> None:
        """Take what happened in a segment into the run's figures."""
        new: Totals = self.calls.hub("take_totals")
        new.seconds = time.monotonic() - self._began
        self.totals.join(new)
        self._recent.join(new)
        self.bytes_sent += (new.pushed + new.pulled) // len(self.workers)

    def numbers(self) -> dict[str, float]:
        recent, self._recent = self._recent, Totals()
        return recent.numbers()

    def summary(self) -> dict[str, Any]:
        return self.totals.summary()

    def load_summary(self, summary: Mapping[str, Any]) -> None:
        self.totals = Totals.of(summary)

    def peaks(self, mine: float) -> list[float]:
        return [mine, self.totals.peak]
