"""What all ranks do together to save, find and load a run's state."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from visiontrain.core.errors import CheckpointError, ConfigError, StorageError
from visiontrain.core.interfaces import StateDict
from visiontrain.engine.checkpoint import (
    MANIFEST,
    PARTS,
    CheckpointStore,
    Found,
    Snapshot,
    read,
)
from visiontrain.engine.config import SaveConfig
from visiontrain.engine.learner import Learner
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.shards import Shard, write_shard
from visiontrain.engine.weights import WeightsMeta, floats_of, load_weights, save_weights
from visiontrain.engine.writer import Job, Writer

T = TypeVar("T")
SEEN_S = 10.0  # in which a new folder is seen by all processes: network file systems take a while


class Saver:
    """Saves a learner's state: all ranks give theirs, the main process or each of them writes."""

    def __init__(
        self,
        learner: Learner,
        folder: RunFolder,
        meta: WeightsMeta,
        config: SaveConfig,
        fixed: Mapping[str, Any],
    ) -> None:
        """Note what to save where.

        Args:
            learner: whose state.
            folder: of the run.
            meta: what weights files say of themselves, scores aside.
            config: how.
            fixed: JSON that a checkpoint and a run that goes on from it must agree on.
        """
        self.learner, self.folder, self.meta, self.fixed = learner, folder, meta, fixed
        self.strategy, self.config = learner.strategy, config
        self.store = CheckpointStore(folder.checkpoints, config.keep)
        self.writer = Writer(background=config.background)
        self._give_up = Event()  # set when another process's part of a checkpoint will not come

    # -- saving -------------------------------------------------------------------

    def checkpoint(self, progress: Mapping[str, Any]) -> None:
        """Save everything resume needs, once the checkpoint before is on the disk. Collective.

        In the background it is not on the disk yet: `settle` waits for that.

        Raises:
            StorageError: on every rank, when this one or the one before cannot be written.
        """
        self._heard("checkpoint")
        progress = copy.deepcopy(progress)  # training goes on while it is written
        meta = {**self.fixed, "version": self.meta.version}
        snapshot = Snapshot(self.learner.step, meta, {}, progress)
        job = self._sharded(snapshot) if self.config.sharded else self._whole(snapshot)
        self._write("checkpoint", job)

    def weights(self, metrics: Mapping[str, Any], epoch: int, *, improved: bool) -> None:
        """Save last.safetensors, and best.safetensors when the score `improved`. Collective.

        Raises:
            StorageError: as of `checkpoint`.
        """
        self._heard("weights")
        named = self.learner.tensors()
        whole = self.strategy.collect({**named["model"], **named["ema"]}, everywhere=False)
        meta = replace(self.meta, metrics=metrics, epoch=epoch, step=self.learner.step)
        paths = [self.folder.last, *([self.folder.best] if improved else [])]

        def job() -> None:
            tensors = floats_of(whole)
            for path in paths:
                save_weights(path, meta, tensors)

        self._write("weights", job if self.strategy.place.is_main else None)

    def settle(self) -> None:
        """Wait until all that was saved is on the disk. Collective.

        Raises:
            StorageError: on every rank, when it cannot be written.
        """
        for kind in ("weights", "checkpoint"):
            self._heard(kind)

    def forget(self) -> None:
        """Forget that the last checkpoint failed: the next one may not. Collective.

        Not of weights: what a checkpoint told of the best would not be there.
        """
        with suppress(StorageError):
            self._heard("checkpoint")

    def rest(self) -> None:
        """Wait for this process's own writing; whether it worked is told by what comes next."""
        self.writer.rest()

    def close(self, *, wait: bool = True) -> None:
        """Leave no thread behind, however the run ended; wait for bytes, not for processes.

        Args:
            wait: else what is being written is left unfinished: a draft, never half a checkpoint.
        """
        self._give_up.set()
        if wait:
            self.writer.rest()

    def _whole(self, snapshot: Snapshot) -> Job | None:
        """Collect the state on the main process; return what writes it there."""
        tensors = self.learner.collect(everywhere=False)
        own = self.strategy.collect_own(self.learner.tensors())
        if not self.strategy.place.is_main:
            return None
        whole = replace(snapshot, tensors={**tensors, "strategy": own})
        return self._after_weights(lambda: self.store.save(whole))

    def _sharded(self, snapshot: Snapshot) -> Job | None:
        """Start to write what this process holds; return what makes a checkpoint of all parts."""
        place, strategy = self.strategy.place, self.strategy
        strategy.sync_buffers(self.learner.model)
        named = self.learner.tensors()
        tensors = {**named, "strategy": strategy.collect_own(named)}
        size = sum(t.nbytes for named in tensors.values() for t in named.values())
        draft = self._draft(snapshot.step, size)
        pieces = {part: strategy.shard(named) for part, named in tensors.items()}
        shard = Shard(place.rank, place.world, pieces)
        self.writer.start("shard", lambda: write_shard(draft, shard))
        self._give_up = give_up = Event()
        if not self.config.background:
            self._parts_written()
        if not place.is_main:
            return None
        world = place.world
        return self._after_weights(lambda: self.store.complete(draft, snapshot, world, give_up))

    def _after_weights(self, job: Job) -> Job:
        """Let `job` fail where the weights did: it would tell of a best that is not there."""
        weights = self.writer.pending("weights")

        def both() -> None:
            if weights is not None:
                weights.result()
            job()

        return both

    def _parts_written(self) -> None:
        """Wait for this process's part; if one's failed, let the main process not wait for it."""
        if self.strategy.any(flag=self._failure("shard") is not None):
            self._give_up.set()

    def _draft(self, step: int, size: int) -> Path:
        """Let the main process make a folder that all write into. Collective.

        Raises:
            ConfigError: on every rank, when one does not see the folder.
        """
        made = failure = None
        if self.strategy.place.is_main:
            try:
                made = self.store.begin(step, size).name
            except StorageError as error:
                failure = str(error)
        made, failure = self.strategy.broadcast([made, failure])
        if failure is not None:
            raise StorageError(failure)
        draft = self.store.folder / made
        if self.strategy.any(flag=not _is_seen(draft)):
            raise ConfigError(
                f"save.sharded: true, but not every process sees {draft}; put the run's folder "
                "(out) on a file system that all machines share, or take save.sharded=false"
            )
        return draft

    def _write(self, kind: str, job: Job | None) -> None:
        if job is not None:
            self.writer.start(kind, job)
        if not self.config.background:
            self._heard(kind)

    def _heard(self, kind: str) -> None:
        """Wait until the last save of a kind is on the disk; every rank learns whether it is."""
        if self.config.sharded and kind == "checkpoint":
            self._parts_written()
        # Only the main process's counts: it fails when another's part does not come.
        failure = self.strategy.broadcast(self._failure(kind))
        if failure is not None:
            if self.strategy.place.is_main:  # another's part may have come after it was given up
                self.store.drop_drafts()
            raise StorageError(failure)

    def _failure(self, kind: str) -> str | None:
        """Wait for this process's last job of a kind; return why it could not write."""
        try:
            self.writer.wait(kind)
        except StorageError as error:
            return str(error)
        return None

    # -- going on -----------------------------------------------------------------

    def exists(self) -> bool:
        """Tell whether there is a checkpoint. Collective."""
        self.settle()
        return self.strategy.broadcast(bool(self.store))

    def newest(self) -> Found | None:
        """Let the main process choose a checkpoint, so that all load the same one. Collective.

        Raises:
            CheckpointError: on every rank, when none is intact, or it belongs to another run.
        """
        self.settle()
        found = self._everywhere(self._on_main(self.store.newest))
        if found is None:
            return None
        for key, mine in self.fixed.items():
            theirs = found.snapshot.meta.get(key)
            if not agree(theirs, mine):
                raise CheckpointError(
                    f"{found.path}: its {key} is {theirs}, this run's is {mine}; give what the run "
                    "was started with, or a new folder"
                )
        return found

    def best(self) -> StateDict:
        """Return the weights with the best score, which the main process reads. Collective.

        Raises:
            CheckpointError: on every rank, when they cannot be read.
        """
        return self.strategy.share(
            self._on_main(lambda: load_weights(self.folder.best).tensors) or {}
        )

    def restore(self, found: Found) -> str | None:
        """Load the tensors of a checkpoint; say what of them could not be used. Collective.

        Gives back the room of checkpoints that are no longer kept, so that a run which a full
        disk ended can go on with a smaller `save.keep`.
        """
        tensors = found.snapshot.tensors
        self.learner.load(tensors)
        dropped = self.strategy.load_own(tensors["strategy"], self.learner.tensors())
        if self.strategy.place.is_main:
            self.store.prune(found.snapshot.step)
        return dropped

    def _everywhere(self, found: Found | None) -> Found | None:
        """Let every process read what the main one found, or be sent it where it sees no file."""
        manifest = (found.path / MANIFEST).read_text() if found else None
        known = self.strategy.broadcast([str(found.path), manifest] if found else None)
        if known is None:
            return None
        path = Path(known[0])
        if self.strategy.any(flag=not _holds(path, known[1])):
            return self._sent(found)
        return found or Found(read(path, verify=False), path, ())

    def _sent(self, found: Found | None) -> Found | None:
        """Send what the main process found to all."""
        known = None
        if found:
            snapshot = found.snapshot
            known = {
                "path": str(found.path),
                "rejected": found.rejected,
                "step": snapshot.step,
                "meta": snapshot.meta,
                "progress": snapshot.progress,
            }
        known = self.strategy.broadcast(known)
        if known is None:
            return None
        tensors = {
            p: self.strategy.share(dict(found.snapshot.tensors[p]) if found else {}) for p in PARTS
        }
        snapshot = Snapshot(known["step"], known["meta"], tensors, known["progress"])
        return Found(snapshot, Path(known["path"]), tuple(known["rejected"]))

    def _on_main(self, work: Callable[[], T]) -> T | None:
        """Work on the main process; every rank learns whether it worked."""
        done, failure = None, None
        if self.strategy.place.is_main:
            try:
                done = work()
            except (StorageError, CheckpointError) as error:
                failure = [isinstance(error, StorageError), str(error)]
        failure = self.strategy.broadcast(failure)
        if failure is not None:
            is_storage, message = failure
            raise (StorageError if is_storage else CheckpointError)(message)
        return done


def _is_seen(folder: Path) -> bool:
    """Tell whether a folder that another process made is there, waiting a while for it."""
    end = time.monotonic() + SEEN_S
    while not folder.is_dir():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _holds(path: Path, manifest: str) -> bool:
    """Tell whether this very checkpoint lies here: a machine may have an older run's."""
    file = path / MANIFEST
    return file.is_file() and file.read_text() == manifest


def agree(theirs: Any, mine: Any) -> bool:
    """Tell whether a checkpoint's value is this run's.

    An earlier version may not have written a key, or others too: `check_fixed` and the tensors
    tell whether the model is another.
    """
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping):
        return all(theirs.get(key, value) == value for key, value in mine.items())
    return theirs is None or theirs == mine
