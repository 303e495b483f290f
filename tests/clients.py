"""A federated run's clients as calls in this process, without Flower; some of them misbehave."""

from __future__ import annotations

from visiontrain import worker
from visiontrain.core.errors import VisiontrainError
from visiontrain.strategies.federated.server import Server


class Calls:
    """An `Engine` that calls clients one after the other."""

    at_once = 1

    def __init__(self, config, remote, change=None):
        self.config, self.remote, self.change = config, remote, change or plain
        self.asked = []

    joins = False

    def open(self, stopping):
        pass

    def clients(self, count, seconds):
        del count, seconds
        return list(range(self.config.clients))

    def ask(self, messages, seconds, enough):
        del seconds
        found = {}
        for client, message in messages.items():
            self.asked.append(client)
            answer = self.change(client, lambda c=client, m=message: self._answer(c, m))
            if answer is not None and sum(not isinstance(a, str) for a in found.values()) < enough:
                found[client] = answer
        return found

    def _answer(self, client, message):
        try:
            return worker.answer(self.remote, client, message)
        except VisiontrainError as error:
            return str(error)

    def close(self):
        pass


def plain(client, answer):
    """Let a client answer."""
    del client
    return answer()


def server_of(made, change=None, kind=Calls):
    """Return what makes the mode with calls in the place of Flower; `made` gets the servers."""

    def build(config, place, precision, remote):
        made.append(Server(place, precision, config, kind(config, remote, change), remote))
        return made[-1]

    return build
