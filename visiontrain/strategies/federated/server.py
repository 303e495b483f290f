"""The server of a federated run: a round is its step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.errors import RankError, Stopped
from visiontrain.core.interfaces import Fitter, StateDict, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss, Outcome, Place
from visiontrain.data.loader import Step
from visiontrain.strategies.base import NamedParts, Strategy, on_cpu
from visiontrain.strategies.federated.algorithms import Scaffold, Update, algorithm_of
from visiontrain.strategies.federated.config import Federated
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
    term_in,
    write,
)
from visiontrain.strategies.federated.roster import HELLO_S, LOOK_S, Roster
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import Bytes, RefusedError

_tell = logging.getLogger(__name__).warning
TRIES = 3  # of a round without enough results
BACK_S = 90.0  # in which clients find a server again that was away
OWN = "federated/"  # of names in a checkpoint
NEW_ALGORITHM = "what the server kept is left out: another algorithm or version made it"


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
        self.roster = Roster(config, engine)
        self._updates: Sequence[Update] = ()
        self._silent: dict[int, int] = {}  # who may be at an earlier message still: of which round
        self._images = 0  # that were trained on in a round
        self._began = 0.0
        self._anew = False  # another algorithm made the rounds before
        self._until = 0.0  # when a signal may end what is waited for
        self._newest: dict[str, Tensor] = {}  # weights of the newest round, where clients add to it

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
        return super().collect_own(named) | {n: on_cpu(t) for n, t in self._remembered().items()}

    def _remembered(self) -> dict[str, Tensor]:
        """Return what the algorithm keeps: another's of the same name is something else."""
        own = f"{OWN}{self.config.algorithm}/"
        return {own + name: t for name, t in self.algorithm.state().items()}

    def load_own(self, saved: Mapping[str, Tensor], named: NamedParts) -> str | None:
        line = super().load_own(saved, named)
        if self.shared.own:
            self._newest = {n: named["model"][n].clone() for n in self.shared.down}
        mine = self._remembered()
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
            self._until = 0.0
            self.engine.open(lambda: self.stopping() and time.monotonic() > self._until)
            yield
        finally:
            self.engine.close()

    def drive(self, fitter: Fitter) -> Outcome:
        """Run the whole training; tell clients elsewhere when it is complete."""
        with self.running():
            outcome = fitter.fit()
            if self.engine.joins and not outcome.exit_code:
                with suppress(Stopped, RankError):  # what it was for is done
                    self._part()
            return outcome

    def _part(self) -> None:
        """Tell clients that the run is over: whoever is there, also if no round was needed.

        Also after a signal, which may have come when there was nothing left to stop.
        """
        self._until = time.monotonic() + 2 * LOOK_S
        over = write(schema_of({}, (), ()), {}, {}, {"kind": "over"})
        count, seconds = len(self.roster.there), LOOK_S
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

    def _meet(self, learner: Updatable, seconds: float) -> None:
        """Learn who is there, in so many seconds.

        Raises:
            RankError: nobody.
            Stopped: this process was asked to stop.
        """
        hello = {"kind": "hello", "round": learner.step}
        began, first = time.monotonic(), not self.roster.known
        self.roster.meet(lambda: self._message(learner, hello), self.stopping, seconds)
        if first:  # to wait for clients that are only starting is no training
            self.starting = time.monotonic() - began
            self._began += self.starting

    # -- a round ------------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """Let clients train; return the mean of their losses, and leave what they made."""
        del micro_batches
        self._began, number = time.monotonic(), learner.step
        least, tries = self.roster.needed, 0
        refused, failed, late = set[int](), set[int](), set[int]()  # failed: ask others first
        while tries < TRIES:
            self._meet(learner, self.config.timeout_s)
            chosen = self.roster.chosen(learner.seed, number, refused | failed)
            if len(chosen) < least:
                tries += 1
                _tell(f"round {number + 1}: {len(chosen)} can train, it takes {least} clients")
                continue
            answers = self._train(learner, chosen, refused)
            if self.stopping():  # nothing is changed yet: whoever goes on asks again
                raise Stopped
            self._updates, metas = self._believed(learner, chosen, answers)
            if len(self._updates) >= least:
                break
            # Who answers at once what nobody can use ends no round that others would make.
            worse = answers.keys() - {u.client for u in self._updates} - refused - failed
            refused |= {k for k in worse if not isinstance(answers[k], str)}
            silent = set(chosen) - answers.keys()
            failed |= (worse - refused) | (silent & late)  # once late, it may only have to finish
            late |= silent
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

    def _train(
        self, learner: Updatable, chosen: Sequence[int], refused: Collection[int]
    ) -> dict[int, Answer]:
        """Let clients train; wait for so many more as there are whose answers were refused."""
        number = learner.step
        last = number + 1 == self.config.rounds
        meta = {"kind": "train", "round": number, "score": last or self._scores(number)}
        first = self._message(learner, meta, whole=True)
        later = self._message(learner, meta) if self.shared.own else first
        messages = {k: later if self.roster.known[k] else first for k in chosen}
        # Who was silent just now is still busy, and sent nothing more.
        self._count(m for k, m in messages.items() if self._silent.get(k, -2) < number - 1)
        more = len(set(refused) & set(chosen))
        enough = min((self.config.min_fit or len(chosen)) + more, len(chosen))
        answers = self.engine.ask(messages, self.config.timeout_s, enough)
        told = {k: of for k, of in self._silent.items() if k not in answers}
        self._silent = told | dict.fromkeys(messages.keys() - answers.keys(), number)
        return answers

    def _count(self, messages: Iterable[Bytes]) -> None:
        """Count what goes to clients."""
        sent = sum(message.nbytes for message in messages)
        self.bytes_sent += sent
        self.figures.down += sent

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
            updates.append(update)
            metas.append(meta)
        return updates, metas

    def _loss(self, learner: Updatable, metas: Sequence[Mapping[str, Any]]) -> Loss:
        """Return the sums of the clients' losses and of what they are divided by; note who came."""
        kind, task = self.precision.weights, learner.task
        told = [{name: term_in(meta, name) for name in task.terms} for meta in metas]
        # Of whose loss is no number the others' mean knows nothing.
        good = [all(value is not None for value in terms.values()) for terms in told]
        sums = {
            name: sum(terms[name] or 0.0 for terms, fine in zip(told, good, strict=True) if fine)
            for name in task.terms
        }
        counts = {
            head: sum(u.counts[head] for u, fine in zip(self._updates, good, strict=True) if fine)
            for head in task.heads
        }
        taken = [update.client for update in self._updates]
        self.roster.known |= dict.fromkeys(taken, True)
        self.figures.note(learner.step, taken, metas)
        return self.mean(
            Loss(
                {name: torch.tensor(value, dtype=kind) for name, value in sums.items()},
                {head: torch.tensor(value, dtype=kind) for head, value in counts.items()},
            )
        )

    @torch.no_grad()
    def apply(self, learner: Updatable) -> Tensor:
        """Make the next weights of what clients made; return the mean length of their ways ()."""
        now = {name: on_cpu(learner.live[name]) for name in self.shared.up}
        updates, lines = capped(self._updates)
        usual = median_low(self.figures.lengths.values()) if self.figures.lengths else 0.0
        updates, more = clipped(updates, now, self.parameters, self.config.clip, usual)
        for line in lines + more:
            _tell(line)
        self.figures.cut(updates)
        ways = of_round(updates, now, self.parameters)
        found = self.algorithm.step(now, updates, learner.task.head_of)
        self._put(learner, found)
        norm = torch.tensor(ways.length, dtype=self.precision.weights)
        learner.note(norm)
        learner.lr = learner.rate(learner.step / (self.config.rounds or 1))  # as clients' was
        self.figures.ways(ways, time.monotonic() - self._began, self.engine.at_once)
        # The step counts an epoch's images; these are what clients trained on.
        learner.samples += self._images - self.remote.images
        self._updates = ()
        if self.shared.own:
            self._newest = {n: learner.live[n].clone() for n in self.shared.down}
        if self._scores(learner.step):
            with suppress(Stopped):  # the round itself is done
                self._score(learner, learner.step + 1, self.config.timeout_s)
        return norm

    def _put(self, learner: Updatable, weights: Mapping[str, Tensor]) -> None:
        for name, tensor in weights.items():
            learner.live[name].copy_(tensor)

    # -- scores -------------------------------------------------------------------

    def _scores(self, number: int) -> bool:
        """Tell whether clients score after a round, as they do at the end."""
        every = self.config.score_every
        return bool(every and (number + 1) % every == 0)

    @torch.no_grad()
    def conclude(self, learner: Updatable) -> None:
        """Let clients score the weights that the run reports, whenever it ended.

        With parts of their own, which go with the newest round's weights, they score those.
        """
        self.figures.common.clear()
        reported = {name: learner.live[name].clone() for name in self._newest}
        seconds = min(HELLO_S, self.config.timeout_s)  # everything else is done
        try:
            self._put(learner, self._newest)
            self._meet(learner, min(BACK_S, seconds))
            self._score(learner, learner.step, seconds)
        except (RankError, Stopped) as error:
            _tell(f"no scores by clients: {str(error) or 'asked to stop'}")
        finally:
            self._put(learner, reported)

    def _score(self, learner: Updatable, rounds: int, seconds: float) -> None:
        """Let every client score the weights after so many rounds on images of its own."""
        meta = {"kind": "score", "round": rounds}
        later = self._message(learner, meta)
        first = self._message(learner, meta, whole=True) if self.shared.own else later
        asked = {k: later if self.roster.known[k] else first for k in self.roster.able}
        # Who was late once may be at that for ever.
        busy = {k: message for k, message in asked.items() if k in self._silent}
        free = {k: message for k, message in asked.items() if k not in busy}
        answers = self.engine.ask(free, seconds, len(free))
        answers |= self.engine.ask(busy, min(LOOK_S, seconds), len(busy))
        self._count(m for k, m in asked.items() if k in free or k in answers)
        self._silent = {k: of for k, of in self._silent.items() if k not in answers}
        for client, answer in answers.items():
            if isinstance(answer, str):
                _tell(f"client {client}: no score: {answer}")
        late = asked.keys() - answers.keys()
        if late:
            _tell(f"no score in time by {len(late)} of {len(asked)} clients")
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
