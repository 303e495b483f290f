"""What a worker says to the hub and the servers for each unit of work."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from visiontrain.core.interfaces import Updatable
from visiontrain.core.memory import peak_rss_mb
from visiontrain.core.types import Loss
from visiontrain.strategies.parameter_server.encoding import Encoding
from visiontrain.strategies.parameter_server.figures import Report
from visiontrain.strategies.parameter_server.ledger import Slot, Unit
from visiontrain.strategies.parameter_server.shard import BUFFER, GRADIENT
from visiontrain.strategies.tensor_message import Bytes, Schema, pack, unpack

FAILURES = {"refused", "stale"}  # keys of a server's answer to a push
LOST = "lost"  # in the place of the answer of a server that died; its successor is there now


class LostError(Exception):
    """The unit at hand is nobody's any more: its gradient came late, or a server went back."""


class Link(Protocol):
    """How a worker reaches the others."""

    def hub(self, method: str, *values: Any) -> Any:
        """Call the hub and wait for its answer."""
        ...

    def tell(self, method: str, *values: Any) -> None:
        """Call the hub; what it is told next, it is told later."""
        ...

    def servers(self, method: str, calls: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Call servers at once, each with its values, and wait for all answers.

        One that was lost answers `LOST`, when there is another in its place.
        """
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker and the servers agree on."""

    parts: Sequence[Sequence[str]]  # parameters and float buffers that each server holds
    encoding: Encoding
    own_units: bool = False  # whether gradients go divided by their own counts
    holds: bool = False  # whether a gradient may have to wait until others have read the weights


@dataclass(frozen=True, slots=True)
class Part:
    """What a worker adds to an update."""

    loss: Loss  # sums, of its unit
    images: int  # of its unit
    seen: int  # images since it last added anything
    gradients: Mapping[str, Tensor]
    changes: Mapping[str, Tensor]  # of float buffers
    norm: float | None = None  # of its own update, where it makes some


class Talk:
    """One worker's."""

    def __init__(self, name: str, terms: Terms, link: Link) -> None:
        self.name, self.terms, self.link = name, terms, link
        self.era = 0
        self.unit = Unit(0, 0)
        self.rows: Sequence[Sequence[float]] = ()  # fingerprints of the unit's images
        self._versions = [-1] * len(terms.parts)
        self._pushed = self._pulled = 0  # bytes of this unit
        self._began = self._waited = self._exchanged = 0.0

    def learn(self, learner: Updatable) -> None:
        """Note which of a learner's tensors each server holds."""
        live, named = learner.live, dict(learner.model.named_parameters())
        self.live = [{n: live[n] for n in part} for part in self.terms.parts]
        self.trained = [
            {n: named[n] for n in part if n in named and named[n].requires_grad}
            for part in self.terms.parts
        ]
        self.buffers = [{n: live[n] for n in part if n not in named} for part in self.terms.parts]
        self._schemas = [Schema.of(tensors) for tensors in self.live]

    # -- a unit -------------------------------------------------------------------

    def start(self, unit: Unit) -> int:
        """Wait until this worker may read the weights for a unit; return the samples seen.

        Raises:
            LostError: it is not this worker's any more.
        """
        self.unit, asked = unit, time.monotonic()
        samples = self.link.hub("start", self.name, unit, self.era)
        self._began = time.monotonic()
        self._waited, self._exchanged = self._began - asked, 0.0
        self._pushed = self._pulled = 0
        if samples is None:
            raise LostError
        return samples

    def pull(self) -> dict[str, Tensor]:
        """Return the weights that changed since they were last read, of all servers.

        They lie in the servers' messages, which nobody may write into.
        """
        waiting, found = set(range(len(self._versions))), dict[str, Tensor]()
        asked = time.monotonic()
        while waiting:
            calls = {n: (self._versions[n],) for n in waiting}
            for n, answer in self.link.servers("pull", calls).items():
                if _is_lost(answer):  # it may have gone back
                    self._versions[n] = -1
                    continue
                tensors, meta = unpack(answer, self._schemas[n], copy=False)
                self._versions[n] = meta["version"]
                self._pulled += answer.nbytes
                found |= tensors
                waiting.remove(n)
        self._exchanged += time.monotonic() - asked
        if self.terms.holds:
            self.link.tell("read", self.name, self.era)
        return found

    def slot(self) -> Slot:
        """Wait until this worker may push.

        Raises:
            LostError: nobody wants the gradient any more.
        """
        asked = time.monotonic()
        slot = self.link.hub("slot", self.name, self.unit, self.era)
        self._waited += time.monotonic() - asked
        if slot is None:
            raise LostError
        return Slot(*slot)

    def push(self, slot: Slot, part: Part) -> None:
        """Send a part of an update to the servers, and its loss to the hub.

        Raises:
            LostError: a server went back meanwhile.
        """
        began = time.monotonic()
        sizes = torch._foreach_norm([*part.gradients.values(), *part.changes.values()])
        meta = {
            "counts": {head: value.item() for head, value in part.loss.counts.items()},
            "finite": bool(torch.stack(sizes).isfinite().all()),  # so that all servers agree
        }
        messages = {n: self._message(n, part, meta) for n in range(len(self.terms.parts))}
        self._pushed += sum(message.nbytes for message in messages.values())
        waiting, answers = messages, dict[str, Any]()
        while waiting:  # a server that was lost may not have got it
            calls = {n: (m, slot, self.name, part.seen, self.era) for n, m in waiting.items()}
            got = self.link.servers("push", calls)
            waiting = {n: m for n, m in waiting.items() if _is_lost(got[n])}
            for n in waiting:
                self._versions[n] = -1
            for n in got.keys() - waiting.keys():
                # Of an update all servers say the same; the first one's word counts it once.
                answers |= {k: v for k, v in got[n].items() if not n or k in FAILURES}
        self._exchanged += time.monotonic() - began
        self.settle(good=not answers.keys() & FAILURES)
        if "stale" in answers:
            raise LostError
        if part.norm is not None:
            answers["norm"] = part.norm
        self.done(slot, part.loss, part.images, answers)

    def done(self, slot: Slot, loss: Loss, images: int, answers: Mapping[str, Any]) -> None:
        """Tell the hub what came of the unit."""
        report = Report(
            terms={name: value.item() for name, value in loss.terms.items()},
            counts={head: value.item() for head, value in loss.counts.items()},
            images=images,
            norm=answers.get("norm"),
            staleness=answers.get("staleness"),
            pushed=self._pushed,
            pulled=self._pulled,
            waited=self._waited,
            worked=time.monotonic() - self._began,
            exchanged=self._exchanged,
            peak=peak_rss_mb(),
            rows=self.rows,
        )
        self.link.tell("done", self.name, self.unit, slot, self.era, report)

    def settle(self, *, good: bool) -> None:
        """Keep what the encoding remembers of this gradient, if it was taken in."""
        for memory in self.terms.encoding.memories.values():
            memory.settle(torch.tensor(good))

    def forget(self) -> None:
        """Read everything anew next time: a server may have gone back."""
        self._versions = [-1] * len(self.terms.parts)

    def _message(self, server: int, part: Part, meta: Mapping[str, Any]) -> Bytes:
        mine = {n: part.gradients[n] for n in self.trained[server]}
        sent = {GRADIENT + n: t for n, t in self.terms.encoding.encode(mine).items()}
        sent |= {BUFFER + n: part.changes[n] for n in self.buffers[server]}
        version = {"version": max(0, self._versions[server])}
        return pack(Schema.of(sent), sent, {**meta, **version})


def _is_lost(answer: Any) -> bool:
    return isinstance(answer, str) and answer == LOST
