"""Parameter servers without an engine: hub and servers in one event loop, workers in threads."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from visiontrain import elsewhere
from visiontrain.strategies.member import describe
from visiontrain.strategies.parameter_server.driver import Driver
from visiontrain.strategies.parameter_server.engine import (
    Answer,
    HubEnded,
    ServerEnded,
    WorkerEnded,
)
from visiontrain.strategies.parameter_server.hub import Hub
from visiontrain.strategies.parameter_server.ledger import RULES
from visiontrain.strategies.parameter_server.server import Hosted, Server
from visiontrain.strategies.parameter_server.talk import LOST, LostError


class KilledError(BaseException):
    """What stands for a SIGKILL."""


class Link:
    def __init__(self, engine, name):
        self.engine, self.name = engine, name
        self.known = {}

    def _live(self):
        if self.name in self.engine.killed:
            raise KilledError

    def hub(self, method, *values):
        self._live()
        answer = self.engine.hub(method, *values).result()
        self._live()
        return answer

    def tell(self, method, *values):
        self._live()
        self.engine.hub(method, *values)

    def servers(self, method, calls):
        self._live()
        self.engine.before(self.name, method)
        for n in calls:
            if n not in self.known:
                self.known[n] = self._server(n, 0)
        futures = {n: self.engine.call(self.known[n][1], method, v) for n, v in calls.items()}
        answers = {n: future.result() for n, future in futures.items()}
        for n, answer in answers.items():
            if isinstance(answer, str) and answer == LOST:
                self.known[n] = self._server(n, self.known[n][0])
        return answers

    def _server(self, number, known):
        found = self.hub("server", number, known)
        if found is None:
            raise LostError
        return found


class ThreadEngine:
    """As `Engine`; `before(worker, method)` is called before workers call servers."""

    def __init__(self, config, remote, before=lambda worker, method: None):
        self.config, self.remote, self.before = config, remote, before
        self.killed, self.events, self.lives = set(), queue.Queue(), 0
        self.names, self.threads, self.doomed = {}, [], {}
        self.servers = {}

    def open(self, rule, staleness, shares):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._hub = Hub(RULES[rule](staleness), shares, self.config.servers)

    def start_server(self, number):
        async def exchange(clock, squared, era):
            return await self._hub.exchange(clock, number, squared, era)

        folder = Path(self.remote.scratch) / f"server-{number}"
        every = self.config.snapshot_every

        def made():
            return Server(elsewhere.build_shard(self.remote, number), exchange, folder, every)

        self.servers[number] = hosted = Hosted(made)
        if hosted.failure is not None:
            self.events.put(ServerEnded(number, hosted.failure))
        self.doomed[self.servers[number]] = asyncio.run_coroutine_threadsafe(
            self._event(), self.loop
        ).result()

    async def _event(self):
        return asyncio.Event()

    def publish(self, number):
        self.hub("put_server", number, self.servers[number]).result()

    def kill_server(self, number):
        server = self.servers[number]
        self.loop.call_soon_threadsafe(self.doomed[server].set)
        self.events.put(ServerEnded(number, None))

    def kill_hub(self):
        self.events.put(HubEnded())

    def start_worker(self, name):
        self.lives += 1
        life = f"{name}#{self.lives}"  # who is killed stays so
        self.names[name] = life

        def run():
            try:
                elsewhere.compute(self.remote, name, Link(self, life))
            except KilledError:
                self.events.put(WorkerEnded(name, None))
            except BaseException as error:  # noqa: BLE001 - as the engine does
                self.events.put(WorkerEnded(name, describe(error)))

        self.hub("join", name).result()
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def kill_worker(self, name):
        self.killed.add(self.names[name])

    def hub(self, method, *values):
        async def call():
            answer = getattr(self._hub, method)(*values)
            return await answer if inspect.isawaitable(answer) else answer

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def server(self, number, method, *values):
        return self.call(self.servers[number], method, values)

    def call(self, server, method, values):
        async def call():
            doom = asyncio.ensure_future(self.doomed[server].wait())
            work = asyncio.ensure_future(server.call(method, *values))
            await asyncio.wait([doom, work], return_when=asyncio.FIRST_COMPLETED)
            if doom.done():
                work.cancel()
                return LOST
            doom.cancel()
            return work.result()

        return asyncio.run_coroutine_threadsafe(call(), self.loop)

    def wait(self, call: Future, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                return self.events.get_nowait()
            except queue.Empty:
                pass
            if call.done():
                answer = call.result()
                if not (isinstance(answer, str) and answer == LOST):
                    return Answer(answer)
            time.sleep(0.001)
        return None

    def close(self):
        self.hub("end").result()
        for name in list(self.names):
            self.kill_worker(name)
        for thread in self.threads:
            thread.join(10)
        left = asyncio.run_coroutine_threadsafe(self._left(), self.loop).result()
        assert not left, left
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _left(self):
        """Return what still waits, once all that was asked for is over."""
        work = asyncio.all_tasks() - {asyncio.current_task()}
        return (await asyncio.wait(work, timeout=5))[1] if work else work


def driver_of(made, before=lambda worker, method: None):
    """Return what stands in DRIVERS for the mode; the drivers it makes are added to `made`."""

    def make(config, place, precision, remote):
        engine = ThreadEngine(config, remote, before)
        made.append(Driver(place, precision, config, engine, remote))
        return made[-1]

    return make
