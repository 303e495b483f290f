"""Who takes part in a federated run: clients that are there, and those that a round asks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence

from visiontrain.core.errors import RankError, Stopped
from visiontrain.core.seed import generator
from visiontrain.strategies.federated.config import Federated, least_updates, takers
from visiontrain.strategies.federated.engine import Engine
from visiontrain.strategies.federated.messages import read_meta
from visiontrain.strategies.tensor_message import Bytes

_tell = logging.getLogger(__name__).warning
LOOK_S = 10.0  # between looks at who is there
HELLO_S = 600.0  # in which a client says whether it takes part
AGAIN_S = 60.0  # after which one that refused is asked again: what was wrong may be mended


class Roster:
    """The clients of a run, as the server knows them."""

    def __init__(self, config: Federated, engine: Engine) -> None:
        self._config, self._engine = config, engine
        self.known: dict[int, bool] = {}  # clients, and whether they hold parts of their own
        self.there: Sequence[int] = ()  # those that can be reached
        self._refused: dict[int, float] = {}  # of those, who takes no part, and when it said so
        self._hellos: dict[int, Bytes] = {}  # that are not answered yet

    @property
    def needed(self) -> int:
        """Return how many results a round takes, at least where clients were told so."""
        if not self._engine.joins:
            return least_updates(self._config)
        return self._config.min_fit or takers(self._config)

    @property
    def able(self) -> list[int]:
        """Return who can be asked."""
        return [client for client in self.there if client in self.known]

    def meet(
        self, hello: Callable[[], Bytes], stopping: Callable[[], bool], seconds: float
    ) -> None:
        """Learn who is there; where clients come and go, wait for as many as a round takes.

        Args:
            hello: makes the message that asks a client whether it takes part.
            stopping: whether this process was asked to stop.
            seconds: to wait at most.

        Raises:
            RankError: nobody.
            Stopped: this process was asked to stop.
        """
        joins = self._engine.joins
        if self.known and not self._hellos and not joins:
            return
        end = time.monotonic() + seconds
        told = -1  # how many were there when that was said last
        while True:
            left = max(0.0, end - time.monotonic())
            wanted = self.needed + len(self._refused)  # of whom some may leave meanwhile
            if joins or not self.there:  # who is busy would not be found
                self.there = self._engine.clients(wanted, min(LOOK_S, left) if joins else HELLO_S)
            self._greet(hello, left)
            if stopping():
                raise Stopped
            if len(self.able) >= self.needed or not left or not joins:
                break
            if len(self.able) != told:
                told = len(self.able)
                _tell(
                    f"clients that can train: {told} of {self.needed} that a round takes; "
                    f"waits {left:.0f} s at most"
                )
        if not self.known:
            raise RankError("strategy.clients: none can train; see the lines above")

    def _greet(self, hello: Callable[[], Bytes], left: float) -> None:
        """Ask those who came whether they take part; who does not is asked again later."""
        now = time.monotonic()
        recent = {k: at for k, at in self._refused.items() if now - at < AGAIN_S}
        self._refused = {k: at for k, at in recent.items() if k in self.there}
        new = [k for k in self.there if k not in self.known and k not in self._refused]
        if not new:
            self._hellos = {}
            return
        # The same again to whom did not answer yet: it may only be slow.
        if fresh := [k for k in new if k not in self._hellos]:
            self._hellos |= dict.fromkeys(fresh, hello())
        self._hellos = {k: self._hellos[k] for k in new}
        # Where others can begin already, who is slow to answer is asked again at the next round.
        begins = len(self.able) >= self.needed or (self.known and not self._engine.joins)
        seconds = min(LOOK_S if begins else HELLO_S, left)
        answers = self._engine.ask(self._hellos, seconds, len(new))
        for client in new:
            answer = answers.get(client)
            if answer is None:  # it is asked again
                _tell(f"client {client}: left out: no answer in {seconds:g} s")
                continue
            del self._hellos[client]
            if isinstance(answer, str):
                _tell(f"client {client}: left out: {answer}")
                self._refused[client] = now
                continue
            self.known[client] = bool(read_meta(answer).get("has_state"))

    def chosen(self, seed: int, number: int, failed: Collection[int] = ()) -> list[int]:
        """Draw the clients of a round: the same ones whenever it comes, if they are there.

        Args:
            seed: of the run.
            number: of the round.
            failed: who made nothing of it that can be used, and is asked again for want of others.
        """
        known = sorted(self.known)
        order = generator(seed, "clients", number).permutation(len(known))
        there = [known[k] for k in order if known[k] in self.there]
        there.sort(key=lambda client: client in failed)
        return sorted(there[: takers(self._config)])
