"""The server of a federated run: a round is its step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.errors import RankError, Stopped
from visiontrain.core.interfaces import Fitter, StateDict, Updatable, VisionModel
from visiontrain.core.seed import generator
from visiontrain.core.types import Batch, Loss, Outcome, Place
from visiontrain.data.loader import Step
from visiontrain.strategies.base import NamedParts, Strategy, on_cpu
from visiontrain.strategies.federated.algorithms import Scaffold, Update, algorithm_of
from visiontrain.strategies.federated.config import Federated, least_updates, takers
from visiontrain.strategies.federated.engine import Answer, Engine
from visiontrain.strategies.federated.figures import Rounds, of_round
from visiontrain.strategies.federated.guard import MOST, capped, clipped
from visiontrain.strategies.federated.messages import (
    Shared,
    believed,
    digest_of,
    read_meta,
    run_for,
    schema_of,
    shared,
    write,
)
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import Bytes, RefusedError, number_of

_tell = logging.getLogger(__name__).warning
TRIES = 3  # of a round without enough results
LOOK_S = 10.0  # between looks at who is there
BACK_S = 90.0  # in which clients find a server again that was away
HELLO_S = 600.0  # in which a client says whether it takes part
OWN = "federated/"  # of names in a checkpoint
NEW_ALGORITHM = "what the server remembered of earlier rounds is left out: another algorithm now"


class Server(Strategy):
    """One device's learner, whose steps are rounds of clients' training."""

    def __init__(
        self,
        place: Place,
        precision: Precision,
        config: Federated,
        engine: Engine,
        remote: Remote,
    ) -> None:
        """Serve.

        Args:
            place: of this process.
            precision: what it scores in.
            config: of the mode.
            engine: that reaches the clients.
            remote: what they are told of the run.
        """
        super().__init__(place, precision)
        self.config, self.engine, self.remote = config, engine, remote
        self.figures = Rounds()
        self._known: dict[int, bool] = {}  # clients, and whether they hold parts of their own
        self._there: Sequence[int] = ()  # those that can be reached
        self._refused: set[int] = set()  # of those, who takes no part
        self._updates: Sequence[Update] = ()
        self._hellos: dict[int, Bytes] = {}  # that are not answered yet
        self._silent: set[int] = set()  # that were asked in the newest round, to no avail
        self._images = 0  # that were trained on in a round
        self._began = 0.0
        self._anew = False  # another algorithm made the rounds before

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        live = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        self.shared: Shared = shared(model, self.config.local)
        self.parameters = frozenset(trained & set(self.shared.up))
        self.algorithm = algorithm_of(self.config, self.parameters)
        self.algorithm.start({n: live[n].cpu() for n in self.shared.up})
        self.controlled = tuple(n for n in self.shared.up if n in self.parameters)
        if isinstance(self.algorithm, Scaffold):
            self.algorithm.counts = self.figures.weighs
        else:
            self.controlled = ()

    def collect_own(self, named: NamedParts) -> StateDict:
        own = {OWN + name: on_cpu(t) for name, t in self.algorithm.state().items()}
        return super().collect_own(named) | own

    def load_own(self, saved: Mapping[str, Tensor], named: NamedParts) -> str | None:
        line = super().load_own(saved, named)
        mine = {OWN + name: t for name, t in self.algorithm.state().items()}
        self._anew = not mine.keys() <= saved.keys()
        if self._anew:
            return NEW_ALGORITHM
        self.scatter(saved, mine)
        return line

    # -- the run ------------------------------------------------------------------

    @contextmanager
    def running(self) -> Iterator[None]:
        """Reach the clients while a run goes on."""
        try:
            self.engine.open(self.stopping)
            yield
        finally:
            self.engine.close()

    def drive(self, fitter: Fitter) -> Outcome:
        """Run the whole training; tell clients elsewhere when it is complete."""
        with self.running():
            outcome = fitter.fit()
            if self.engine.joins and not outcome.exit_code:
                with suppress(Stopped):
                    self._part()
            return outcome

    def _part(self) -> None:
        """Tell clients that the run is over: whoever is there, also if no round was needed."""
        over = write(schema_of({}, (), ()), {}, {}, {"kind": "over"})
        count, seconds = len(self._there), LOOK_S
        if not count:  # its clients lost a server that died, and are on their way back
            count, seconds = max(1, len(self.figures.taken)), BACK_S
        there = self.engine.clients(count, seconds)
        self.engine.ask(dict.fromkeys(there, over), HELLO_S, len(there))

    def steps(
        self,
        local: Callable[[], Iterator[Step]],
        blank: Callable[[], Iterator[Step]],
        rests: Callable[[int], bool],
    ) -> Iterator[Step]:
        """Yield rounds, which have no images here."""
        del local, rests
        return blank()

    @property
    def _needed(self) -> int:
        """Return how many results a round takes, at least where clients were told so."""
        if not self.engine.joins:
            return least_updates(self.config)
        return self.config.min_fit or takers(self.config)

    def _meet(self, learner: Updatable) -> None:
        """Learn who is there; where clients come and go, wait for as many as a round takes.

        Raises:
            RankError: nobody.
            Stopped: this process was asked to stop.
        """
        if self._known and not self.engine.joins:
            return
        end, needed = time.monotonic() + self.config.timeout_s, self._needed
        told = -1  # how many were there when that was said last
        while True:
            left = max(0.0, end - time.monotonic())
            wanted = needed + len(self._refused)  # of whom some may leave meanwhile
            seconds = min(LOOK_S, left) if self.engine.joins else left
            self._there = self.engine.clients(wanted, seconds)
            self._greet(learner)
            if self.stopping():
                raise Stopped
            able = [client for client in self._there if client in self._known]
            if len(able) >= needed or not left or not self.engine.joins:
                break
            if len(able) != told:
                told = len(able)
                _tell(
                    f"clients that can train: {told} of {needed} that a round takes; "
                    f"waits {left:.0f} s at most"
                )
        if not self._known:
            raise RankError("strategy.clients: none can train; see the lines above")

    def _greet(self, learner: Updatable) -> None:
        """Ask those who came whether they take part; who does not is asked when it comes again."""
        self._refused &= set(self._there)
        new = [k for k in self._there if k not in self._known and k not in self._refused]
        if not new:
            return
        hello = self._message(learner, {"kind": "hello", "round": learner.step})
        # The same again to whom did not answer yet: it may only be slow.
        self._hellos = {client: self._hellos.get(client, hello) for client in new}
        # Where enough are known already, who is slow to answer is asked again at the next round.
        enough = len(set(self._known) & set(self._there)) >= self._needed
        seconds = min(LOOK_S if enough else HELLO_S, self.config.timeout_s)
        answers = self.engine.ask(self._hellos, seconds, len(new))
        for client in new:
            answer = answers.get(client)
            if answer is None:  # it is asked again
                _tell(f"client {client}: left out: no answer in {seconds:g} s")
                continue
            del self._hellos[client]
            if isinstance(answer, str):
                _tell(f"client {client}: left out: {answer}")
                self._refused.add(client)
                continue
            self._known[client] = bool(read_meta(answer).get("has_state"))

    # -- a round ------------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """Let clients train; return the mean of their losses, and leave what they made."""
        del micro_batches
        self._began, number = time.monotonic(), learner.step
        least, tries, bad = self._needed, 0, set[int]()
        while tries < TRIES:
            self._meet(learner)
            chosen = self._chosen(learner.seed, number)
            answers = self._train(learner, chosen, bad)
            if self.stopping():  # nothing is changed yet: whoever goes on asks again
                raise Stopped
            self._updates, metas = self._believed(learner, chosen, answers)
            self._silent = {k for k in chosen if k not in answers}
            if len(self._updates) >= least:
                break
            # Who answers at once what nobody can use ends no round that others would make.
            good = {update.client for update in self._updates}
            worse = {k for k, a in answers.items() if not isinstance(a, str)} - good - bad
            bad |= worse
            tries += not worse
            _tell(
                f"round {number + 1}: {len(self._updates)} results of {len(chosen)} clients, "
                f"it takes {least}; asking again"
            )
        else:
            raise RankError(
                f"round {number + 1}: fewer than {least} results in {TRIES} tries; everything up "
                "to the round before is saved"
            )
        most = MOST * median_low(float(meta["images"]) for meta in metas)
        self._images = round(sum(min(most, float(meta["images"])) for meta in metas))
        return self._loss(learner, metas)

    def _chosen(self, seed: int, number: int) -> list[int]:
        """Draw the clients of a round: the same ones whenever it comes, if they are there."""
        known = sorted(self._known)
        order = generator(seed, "clients", number).permutation(len(known))
        there = [known[k] for k in order if known[k] in self._there]
        return sorted(there[: takers(self.config)])

    def _train(
        self, learner: Updatable, chosen: Sequence[int], bad: Collection[int]
    ) -> dict[int, Answer]:
        """Let clients train; wait for so many more as there are whose answers were refused."""
        meta = {"kind": "train", "round": learner.step, "score": self._scores(learner.step)}
        first = self._message(learner, meta, whole=True)
        later = self._message(learner, meta) if self.shared.own else first
        messages = {k: later if self._known[k] else first for k in chosen}
        # Who was silent is still busy, and sent nothing more.
        sent = sum(m.nbytes for k, m in messages.items() if k not in self._silent)
        self.bytes_sent += sent
        self.figures.down += sent
        more = len(set(bad) & set(chosen))
        enough = min((self.config.min_fit or len(chosen)) + more, len(chosen))
        return self.engine.ask(messages, self.config.timeout_s, enough)

    def _message(
        self, learner: Updatable, meta: Mapping[str, Any], *, whole: bool = False
    ) -> Bytes:
        names = () if meta["kind"] == "hello" else self.shared.all if whole else self.shared.down
        schema = schema_of(learner.live, self.shared.all, self.controlled)
        controls = self.algorithm.control if isinstance(self.algorithm, Scaffold) else {}
        if meta["kind"] != "train":
            controls = {}
        # Of what clients keep, only what came of rounds that count here.
        taken = {str(client): number for client, number in self.figures.newest.items()}
        counted = {str(client): share for client, share in self.figures.counted.items()}
        told = {**meta, "taken": taken, "counted": counted, "stale": sorted(self.figures.stale)}
        if self.config.serve is not None:  # their machines know nothing of this run
            told |= {"run": run_for(self.remote.run_json), "classes": digest_of(self.remote.names)}
        return write(schema, {n: learner.live[n] for n in names}, controls, told)

    def _believed(
        self, learner: Updatable, chosen: Sequence[int], answers: Mapping[int, Answer]
    ) -> tuple[list[Update], list[Mapping[str, Any]]]:
        """Read what clients made; name those whose answers cannot be used."""
        schema = schema_of(learner.live, self.shared.up, self.controlled)
        updates, metas = [], []
        for client in chosen:
            answer = answers.get(client)
            if answer is None:
                self.figures.late += 1
                _tell(f"client {client}: no result when round {learner.step + 1} was over")
                continue
            if isinstance(answer, str):
                self.figures.failed += 1
                _tell(f"client {client}: failed: {answer}")
                continue
            self.figures.up += answer.nbytes
            try:
                update, meta = believed(answer, schema, learner.task.heads, client)
            except RefusedError as error:
                self.figures.refused += 1
                _tell(f"client {client}: refused: {error}")
                continue
            self._known[client] = True
            updates.append(update)
            metas.append(meta)
        return updates, metas

    def _loss(self, learner: Updatable, metas: Sequence[Mapping[str, Any]]) -> Loss:
        kind = self.precision.weights
        terms = {
            name: torch.tensor(sum(term_in(meta, name) for meta in metas), dtype=kind)
            for name in learner.task.terms
        }
        counts = {
            head: torch.tensor(sum(update.counts[head] for update in self._updates), dtype=kind)
            for head in learner.task.heads
        }
        taken = [update.client for update in self._updates]
        self.figures.note(learner.step, taken, metas)
        return self.mean(Loss(terms, counts))

    @torch.no_grad()
    def apply(self, learner: Updatable) -> Tensor:
        """Make the next weights of what clients made; return the mean length of their ways ()."""
        now = {name: on_cpu(learner.live[name]) for name in self.shared.up}
        updates, lines = capped(self._updates)
        updates, more = clipped(updates, now, self.parameters, self.config.clip)
        for line in lines + more:
            _tell(line)
        self.figures.cut(updates)
        ways = of_round(updates, now, self.parameters)
        found = self.algorithm.step(now, updates, learner.task.head_of)
        for name, tensor in found.items():
            learner.live[name].copy_(tensor)
        norm = torch.tensor(ways.length, dtype=self.precision.weights)
        learner.note(norm)
        self.figures.ways(ways, time.monotonic() - self._began, self.engine.at_once)
        # The step counts an epoch's images; these are what clients trained on.
        learner.samples += self._images - self.remote.images
        if self._scores(learner.step):
            self._score(learner)
        self._updates = ()
        return norm

    # -- scores -------------------------------------------------------------------

    def _scores(self, number: int) -> bool:
        """Tell whether clients score after a round."""
        every = self.config.score_every
        return number + 1 == self.config.rounds or bool(every and (number + 1) % every == 0)

    def _score(self, learner: Updatable) -> None:
        """Let every client score the new weights on images of its own."""
        meta = {"kind": "score", "round": learner.step + 1}
        later = self._message(learner, meta)
        first = self._message(learner, meta, whole=True) if self.shared.own else later
        able = [k for k in self._there if k in self._known and k not in self._silent]
        asked = {k: later if self._known[k] else first for k in able}
        try:
            answers = self.engine.ask(asked, self.config.timeout_s, len(asked))
        except Stopped:  # the round itself is done
            answers = {}
        sent = sum(message.nbytes for message in asked.values())
        self.figures.down += sent
        self.bytes_sent += sent
        for client, answer in answers.items():
            if isinstance(answer, str):
                _tell(f"client {client}: no score: {answer}")
        found = {k: read_meta(a) for k, a in answers.items() if not isinstance(a, str)}
        self.figures.scored(found)

    # -- figures ------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        return self.figures.numbers()

    def summary(self) -> dict[str, Any]:
        return self.figures.summary()

    def describe(self, clients: Sequence[Sequence[int]]) -> None:
        self.figures.classes = {k: list(counts) for k, counts in enumerate(clients)}

    def load_summary(self, summary: Mapping[str, Any]) -> None:
        self.figures.load(summary)
        if self._anew:
            self.figures.forget(variates=bool(self.config.local))


def term_in(meta: Mapping[str, Any], name: str) -> float:
    """Return a term of the loss from a client's message; 0 where there is none."""
    found = meta.get("terms")
    return (number_of(found.get(name)) or 0.0) if isinstance(found, dict) else 0.0
