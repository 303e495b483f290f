"""A server of a run: its shard, behind calls that wait for what other servers know."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from visiontrain.core.durable import replace_file
from visiontrain.strategies.base import on_cpu
from visiontrain.strategies.member import describe
from visiontrain.strategies.parameter_server.ledger import Slot
from visiontrain.strategies.parameter_server.shard import Applied, Shard
from visiontrain.strategies.tensor_message import Bytes, RefusedError, Schema, pack, unpack

KEPT = 2  # snapshots: one server may die when the others have written the next one already
# Takes clock, squared norm, era; returns that of all servers, or None: `Hub.exchange`.
Exchange = Callable[[int, float, int], Coroutine[Any, Any, float | None]]


class Server:
    """Coroutines of one event loop, so that nothing here happens twice at a time."""

    def __init__(self, shard: Shard, exchange: Exchange, snapshots: Path, every: int) -> None:
        """Serve a shard.

        Args:
            shard: what it holds.
            exchange: of squared norms with the other servers.
            snapshots: folder for them, this server's own.
            every: updates between snapshots.
        """
        self.shard, self.exchange = shard, exchange
        self.snapshots, self.every = snapshots, every
        self.era = 0
        self._applying: dict[int, asyncio.Future[None]] = {}
        self._written: asyncio.Future[None] | None = None

    # -- workers' -----------------------------------------------------------------

    async def pull(self, have: int) -> Bytes:
        """Return the weights that changed since version `have`; all for -1."""
        return self.shard.pull(have)

    async def push(
        self, message: Bytes, slot: Slot, worker: str, images: int, era: int
    ) -> dict[str, Any]:
        """Take in a gradient of some images; if it completes an update, once that is applied."""
        if era != self.era:
            return {"stale": True}
        slot, answer = Slot(*slot), {}
        again = self.shard.already(slot.clock)
        if again is not None:
            await self.exchange(slot.clock, again, era)
            return answer
        try:
            complete = self.shard.push(message, slot, worker, images)
        except RefusedError as error:
            answer["refused"] = str(error)
            complete = self.shard.is_complete(slot)
        if complete:
            applied = await self._apply(slot.clock)
            if applied is not None:
                answer |= {"norm": applied.norm, "staleness": applied.staleness}
        return answer

    async def _apply(self, clock: int) -> Applied | None:
        """Apply an update once, however many wait for it; tell the first what it did."""
        if clock in self._applying:
            await asyncio.shield(self._applying[clock])
            return None
        self._applying[clock] = future = asyncio.get_running_loop().create_future()
        era, applied = self.era, None
        try:
            squared = await self.exchange(clock, self.shard.prepare(clock), era)
            if squared is not None and era == self.era:
                applied = self.shard.apply(clock, squared)
                if self.shard.version % self.every == 0:
                    self._snapshot()
        finally:  # also when that failed, or was cancelled: others wait for this
            self._applying.pop(clock, None)
            future.set_result(None)
        return applied

    # -- the driver's -------------------------------------------------------------

    async def load(self, message: Bytes, position: Mapping[str, int], era: int) -> None:
        """Take the driver's state, as `state` returns it."""
        await self._rest()
        tensors, _ = unpack(message, self.schema, copy=False)
        self.shard.load(tensors, position)
        self.era = era
        for old in self.snapshots.glob("[0-9]*.safetensors"):  # of another past
            old.unlink()

    async def state(self) -> Bytes:
        """Return everything this server holds."""
        state = self.shard.state()
        return pack(Schema.of(state), state, {})

    async def gradients(self) -> Bytes:
        """Return the gradients of the last update, divided and clipped."""
        return pack(Schema.of(self.shard.trained), self.shard.gradients(), {})

    async def turn(self, era: int) -> None:
        """Enter an era: gradients of the one before are for nothing."""
        self.era = era
        self.shard.drop()

    async def forget(self) -> list[str]:
        """Drop what is known of a segment's updates; return what was refused since the last."""
        self.shard.forget()
        refused, self.shard.refused = self.shard.refused, []
        return refused

    @property
    def schema(self) -> Schema:
        """Describe the state."""
        return Schema.of(self.shard.state())

    # -- snapshots ----------------------------------------------------------------

    async def versions(self) -> list[int]:
        """List the updates there are snapshots of, the newest last."""
        await self._rest()
        return sorted(int(path.stem) for path in self.snapshots.glob("[0-9]*.safetensors"))

    async def restore(self, version: int, era: int) -> dict[str, int]:
        """Go back to a snapshot; return where it is."""
        await self._rest()
        tensors, position = read_snapshot(self._path(version))
        self.shard.load(tensors, position)
        self.era = era
        for newer in self.snapshots.glob("[0-9]*.safetensors"):
            if int(newer.stem) > version:
                newer.unlink()
        return position

    def _path(self, version: int) -> Path:
        return self.snapshots / f"{version:09d}.safetensors"

    def _snapshot(self) -> None:
        """Copy the state, and write it while training goes on."""
        if self._written is not None and not self._written.done():
            return  # the disk is slower than training: this one is left out
        tensors = {name: on_cpu(t).contiguous() for name, t in self.shard.state().items()}
        position, path = dict(self.shard.position), self._path(self.shard.version)
        loop = asyncio.get_running_loop()
        self._written = loop.run_in_executor(None, write_snapshot, path, tensors, position)

    async def _rest(self) -> None:
        if self._written is not None:
            written, self._written = self._written, None
            try:
                await written
            except OSError as error:
                self.shard.refused.append(f"{self.snapshots}: no snapshot, {error.strerror}")


class Hosted:
    """A server as it is called and watched from other processes: also one that cannot be made."""

    def __init__(self, make: Callable[[], Server]) -> None:
        """Make a server; keep what went wrong for who watches it."""
        self._server: Server | None = None
        self.failure: Mapping[str, Any] | None = None  # as of `member.describe`
        try:
            self._server = make()
        except BaseException as error:  # noqa: BLE001 - the driver raises it
            self.failure = describe(error)

    async def call(self, method: str, *values: Any) -> Any:
        """Call the server; without one this never ends, and `live` says why."""
        if self._server is None:
            await asyncio.Event().wait()
        return await getattr(self._server, method)(*values)

    async def live(self) -> Mapping[str, Any]:
        """Go on as long as the process does; return what went wrong if there is no server."""
        if self.failure is None:
            await asyncio.Event().wait()
        return self.failure or {}


def write_snapshot(path: Path, tensors: Mapping[str, Tensor], position: Mapping[str, int]) -> None:
    """Write a snapshot, complete or not at all; drop those that are not needed any more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(dict(tensors), {"position": json.dumps(dict(position))}))
    older = sorted(path.parent.glob("[0-9]*.safetensors"))[:-KEPT]
    for old in older:
        old.unlink(missing_ok=True)


def read_snapshot(path: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Read what `write_snapshot` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, json.loads(file.metadata()["position"])
