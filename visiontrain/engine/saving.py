"""What all ranks do together to save, find and load a run's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.core.interfaces import StateDict
from visiontrain.engine.checkpoint import CheckpointStore, Found, Snapshot, read
from visiontrain.engine.learner import Learner
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.weights import WeightsMeta, floats_of, save_weights


class Saver:
    """Collects a learner's state from all ranks; the main process writes it."""

    def __init__(
        self,
        learner: Learner,
        folder: RunFolder,
        meta: WeightsMeta,
        *,
        keep: int,
        fixed: Mapping[str, Any],
    ) -> None:
        """Note what to save where.

        Args:
            learner: whose state.
            folder: of the run.
            meta: what weights files say of themselves, scores aside.
            keep: checkpoints to keep.
            fixed: JSON that a checkpoint and a run that goes on from it must agree on.
        """
        self.learner, self.folder, self.meta, self.fixed = learner, folder, meta, fixed
        self.strategy = learner.strategy
        self.store = CheckpointStore(folder.checkpoints, keep)

    def checkpoint(self, whole: Mapping[str, StateDict], progress: Mapping[str, Any]) -> None:
        """Write everything resume needs. Collective.

        Raises:
            StorageError: on every rank, when it cannot be written.
        """
        extra = self.strategy.collect_own(self.learner.tensors())
        meta = {**self.fixed, "version": self.meta.version}
        snapshot = Snapshot(self.learner.step, meta, {**whole, "strategy": extra}, progress)
        self._write(lambda: self.store.save(snapshot))

    def weights(
        self,
        whole: Mapping[str, StateDict],
        metrics: Mapping[str, Any],
        epoch: int,
        *,
        improved: bool,
    ) -> None:
        """Write last.safetensors, and best.safetensors when the score `improved`. Collective.

        Raises:
            StorageError: on every rank, when they cannot be written.
        """
        tensors = floats_of({**whole["model"], **whole["ema"]})
        meta = replace(self.meta, metrics=metrics, epoch=epoch, step=self.learner.step)
        paths = [self.folder.last, *([self.folder.best] if improved else [])]
        self._write(lambda: [save_weights(path, meta, tensors) for path in paths])

    def exists(self) -> bool:
        """Tell whether there is a checkpoint. Collective."""
        return self.strategy.broadcast(bool(self.store))

    def newest(self) -> Found | None:
        """Let the main process choose a checkpoint, so that all load the same one. Collective.

        Raises:
            CheckpointError: when none is intact, or it belongs to another run.
        """
        found = self.store.newest() if self.strategy.place.is_main else None
        name = self.strategy.broadcast(found.path.name if found else None)
        if name is None:
            return None
        path = self.store.folder / name
        found = found or Found(read(path), path, ())
        for key, mine in self.fixed.items():
            theirs = found.snapshot.meta.get(key)
            if theirs != mine:
                raise CheckpointError(
                    f"{path}: its {key} is {theirs}, this run's is {mine}; give what the run "
                    "was started with, or a new folder"
                )
        return found

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

    def _write(self, write: Callable[[], object]) -> None:
        """Write on the main process; every rank learns whether it worked."""
        failure = None
        if self.strategy.place.is_main:
            try:
                write()
            except StorageError as error:
                failure = str(error)
        failure = self.strategy.broadcast(failure)
        if failure is not None:
            raise StorageError(failure)
