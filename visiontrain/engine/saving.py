"""What all ranks do together to save, find and load a run's state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from visiontrain.core.errors import CheckpointError, StorageError
from visiontrain.core.interfaces import StateDict
from visiontrain.engine.checkpoint import PARTS, CheckpointStore, Found, Snapshot
from visiontrain.engine.learner import Learner
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.weights import WeightsMeta, floats_of, load_weights, save_weights

T = TypeVar("T")


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
        self._on_main(lambda: self.store.save(snapshot))

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
        self._on_main(lambda: [save_weights(path, meta, tensors) for path in paths])

    def exists(self) -> bool:
        """Tell whether there is a checkpoint. Collective."""
        return self.strategy.broadcast(bool(self.store))

    def newest(self) -> Found | None:
        """Let the main process read a checkpoint: others may not see the folder. Collective.

        Raises:
            CheckpointError: on every rank, when none is intact, or it belongs to another run.
        """
        found = self._sent(self._on_main(self.store.newest))
        if found is None:
            return None
        for key, mine in self.fixed.items():
            theirs = found.snapshot.meta.get(key)
            if theirs != mine:
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
            p: self.strategy.share(found.snapshot.tensors[p] if found else {}) for p in PARTS
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
