"""Nobody is left waiting: when the run ends, when an update fails, when a server cannot be made."""

from __future__ import annotations

import asyncio

import pytest

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.parameter_server.hub import Hub
from visiontrain.strategies.parameter_server.ledger import RULES, Slot, Unit
from visiontrain.strategies.parameter_server.server import Hosted, Server


async def waiting(*calls):
    """Begin calls; return them when none gets any further by itself."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    return tasks


def test_the_end_of_a_run_answers_everybody_who_waits():
    async def played():
        hub = Hub(RULES["bsp"](0), 2, 2)
        for name in ("a", "b", "c"):
            await hub.join(name)
        await hub.open([0, 1], 0)
        units = [hub.claim(name, 0) for name in ("a", "b", "c")]
        assert units[2] == Unit(1, 0)
        assert await hub.start("a", units[0], 0) == 0
        hub.claim("b", 0)
        tasks = await waiting(
            hub.result(0),
            hub.finished(),
            hub.server(0, 0),
            hub.start("c", units[2], 0),
            hub.exchange(0, 1, 2.0, 0),
            hub.segment("a"),
            hub.live(),
        )
        await hub.end()
        answers = await asyncio.wait_for(asyncio.gather(*tasks), 5)
        assert answers == [{}, 0, None, None, None, None, None]
        # What comes later is not kept waiting either.
        assert await hub.slot("a", units[0], 0) is None
        assert hub.claim("a", 0) is None
        assert await hub.server(1, 0) is None

    asyncio.run(played())


def test_the_end_of_a_run_lets_go_who_may_not_push_yet():
    async def played():
        hub = Hub(RULES["ssp"](0), 2, 1)
        for name in ("a", "b"):
            await hub.join(name)
        await hub.open([0], 0)
        units = {name: hub.claim(name, 0) for name in ("a", "b")}
        for name, unit in units.items():
            await hub.start(name, unit, 0)
        (task,) = await waiting(hub.slot("a", units["a"], 0))  # b has not read
        await hub.end()
        assert await asyncio.wait_for(task, 5) is None

    asyncio.run(played())


class Failing:
    """A shard with one update that is complete."""

    def already(self, clock):
        del clock

    def push(self, message, slot, worker, images):
        del message, slot, worker, images
        return True

    def prepare(self, clock):
        del clock
        return 1.0


def test_who_waits_for_an_update_that_fails_is_let_go(tmp_path):
    gate = asyncio.Event()

    async def exchange(clock, squared, era):
        del clock, squared, era
        await gate.wait()
        raise ConnectionError

    async def played():
        server = Server(Failing(), exchange, tmp_path, 10)
        slot = Slot(0, 0, 1)
        first, second = await waiting(
            server.push(b"", slot, "a", 1, 0), server.push(b"", slot, "b", 1, 0)
        )
        gate.set()
        with pytest.raises(ConnectionError):
            await first
        assert await asyncio.wait_for(second, 5) == {}

    asyncio.run(played())


def test_what_went_wrong_in_making_a_server_is_told_to_who_watches_it():
    def make():
        raise ConfigError("data: gone; bring it back")

    async def played():
        hosted = Hosted(make)
        (call,) = await waiting(hosted.call("pull", -1))
        told = await asyncio.wait_for(hosted.live(), 5)
        assert (told["kind"], told["message"]) == ("ConfigError", "data: gone; bring it back")
        call.cancel()

    asyncio.run(played())
