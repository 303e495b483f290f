"""The architecture on one page: what each kind of part offers the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontrain.core.errors import ConfigError
from visiontrain.core.recompute import recomputed
from visiontrain.core.types import Batch, ClassRows, Loss, Outcome, Prediction, Views

StateDict = dict[str, Tensor]
Metrics = dict[str, Any]  # flat names -> floats; `per_class` -> {name: {metric: float}}
IMAGE = "image"  # the name of a model's input among `VisionModel.inputs`


class TensorSource(Mapping[str, Tensor], ABC):
    """Named tensors that lie in files: read when they are asked for, whole or in part."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return the rows from `start` to before `stop` of a tensor."""
        ...


class VisionModel(nn.Module, ABC):
    """A graph of blocks, written as their execution order and the names each one reads.

    Pipelines cut between blocks, FSDP shards by block, freezing counts blocks; none of
    them needs to know the architecture. A block returns one tensor; only the last may
    return a flat tuple. Blocks never write to their inputs in place.
    """

    blocks: nn.ModuleDict  # in execution order; the names are the checkpoint's keys
    inputs: Mapping[str, tuple[str, ...]]  # block -> what it reads: blocks before it, or IMAGE
    reads: tuple[str, ...] = ()  # fields of Batch that blocks read in training beside IMAGE
    body: tuple[str, ...] = ()  # parameters that may come pretrained: prefixes, first block first
    frozen: tuple[str, ...] = ()  # blocks that do not train and stay in evaluation mode
    class_rows: Mapping[str, ClassRows] = {}  # of tensors with other than one row per class
    recompute = False  # whether blocks that train drop their activations until backward

    def recompute_blocks(self) -> None:
        """Keep what goes from block to block for the backward pass, and compute the rest twice.

        Raises:
            ConfigError: the model is one block: all of it would be there again at once.
        """
        if len(self.blocks) == 1:
            raise ConfigError(
                "recompute: true with a model of one block, where it saves nothing; leave it out"
            )
        self.recompute = True

    def freeze(self, count: int) -> None:
        """Stop the first `count` blocks from training, statistics included.

        Raises:
            ConfigError: when none would be left to train.
        """
        if count >= len(self.blocks):
            raise ConfigError(f"freeze: {count}; the model has {len(self.blocks)} blocks")
        self.frozen = tuple(self.blocks)[:count]
        for name in self.frozen:
            self.blocks[name].requires_grad_(requires_grad=False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Switch to training or evaluation; frozen blocks stay in evaluation."""
        super().train(mode)
        for name in self.frozen:
            self.blocks[name].eval()
        return self

    def forward(self, images: Tensor, **given: Tensor) -> Any:
        """Run every block on `images` (B, 3, H, W) and, in training, on what `reads` names."""
        values = {IMAGE: images, **dict.fromkeys(self.reads), **given}
        (result,) = self.run(list(self.blocks), values, keep=[list(self.blocks)[-1]])
        return result

    def run(self, names: Sequence[str], values: dict[str, Any], keep: Sequence[str]) -> list[Any]:
        """Run the blocks `names` on `values`; return `keep`, dropping what is dead on the way."""
        last_use = {source: name for name in names for source in self.inputs[name]}
        for name in names:
            inputs = [values[source] for source in self.inputs[name]]
            values[name] = self._run_block(name, inputs)
            for source in set(self.inputs[name]):
                if last_use[source] == name and source not in keep:
                    del values[source]
        return [values[name] for name in keep]

    def _run_block(self, name: str, inputs: Sequence[Any]) -> Any:
        training = self.training and torch.is_grad_enabled() and name not in self.frozen
        if self.recompute and training:
            return recomputed(self.blocks[name], *inputs)
        return self.blocks[name](*inputs)

    def live(self, n: int) -> tuple[str, ...]:
        """Name the values made before block `n` and read at or after it, in the order made."""
        names = [IMAGE, *self.blocks]
        needed = {source for name in names[n + 1 :] for source in self.inputs[name]}
        return tuple(name for name in names[: n + 1] if name in needed)


class Task(Protocol):
    """What is learned: a loss for training, predictions and scores for evaluation."""

    @property
    def best(self) -> str:
        """The metric that picks the best checkpoint, higher is better."""
        ...

    @property
    def views(self) -> Views:
        """How images are looked at to be scored."""
        ...

    @property
    def heads(self) -> tuple[str, ...]:
        """Each has a count, which its terms are divided by."""
        ...

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss terms, `head/term`."""
        ...

    def loss(self, outputs: Any, batch: Batch, progress: float) -> Loss:
        """Compare a model's training outputs with `batch`; `progress` runs from 0 to 1."""
        ...

    def head_of(self, parameter: str) -> str:
        """Name the head whose terms alone reach `parameter`, by which its gradient is divided."""
        ...

    def decode(self, outputs: Any, batch: Batch) -> Sequence[Prediction]:
        """Turn evaluation outputs into one prediction per image, boxes in original pixels."""
        ...


class Evaluator(Protocol):
    """Scores predictions against a table's ground truth. Rows of all ranks are put together."""

    def update(self, predictions: Sequence[Any], ids: Tensor) -> None:
        """Take the predictions of the images `ids` (B,)."""
        ...

    def rows(self) -> Tensor:
        """Return all that was taken as one float64 tensor (K, columns), to be gathered.

        The first column is the image's id.
        """
        ...

    def compute(self, rows: Tensor) -> Metrics:
        """Score rows in any order; each image of the table counts once."""
        ...


class ImageSource(Protocol):
    """Pixels by row. Implementations are files, composed scenes, and caches of either."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> NDArray[np.uint8]:
        """Return image `row` as (H, W, 3) RGB; raise DataError when it cannot be read."""
        ...

    def name(self, row: int) -> str:
        """Name image `row` for people: a path, or `digits/train/000012`."""
        ...


@runtime_checkable
class Logger(Protocol):
    """Somewhere to write numbers and pictures. Built on the main process only."""

    name: str  # its key in LOGGERS; checkpoints keep its state under it

    def start(self, config: Mapping[str, Any], out: Path) -> None:
        """Open, or on resume reopen; called once before the first log."""
        ...

    def log(self, row: Mapping[str, float], step: int) -> None:
        """Take the numbers of one epoch, keyed as in results.csv."""
        ...

    def image(self, name: str, path: Path, step: int) -> None:
        """Take a picture that was written to `path`."""
        ...

    def state(self) -> dict[str, Any]:
        """Return what resume must hand back to continue the same log (an id)."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`; called before `start`, and again where training rolls back."""
        ...

    def close(self, *, exit_code: int = 0) -> None:
        """Flush and end; a non-zero `exit_code` marks the run as not complete."""
        ...


class Progress(Protocol):
    """What a person watches while a run goes on. Built on the main process only."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Begin epoch `epoch` (from 1) of `epochs`, of `steps` optimizer steps."""
        ...

    def step(self, done: int, terms: Mapping[str, float], numbers: Mapping[str, float]) -> None:
        """Take the state after `done` steps of this epoch.

        Args:
            done: optimizer steps of this epoch that are over.
            terms: loss terms by name, means since the last call.
            numbers: `lr`, `images_per_s`, `data_wait` (share of time waiting for data).
        """
        ...

    def end_epoch(self, row: Mapping[str, float]) -> None:
        """Show the row that went into results.csv."""
        ...

    def message(self, text: str) -> None:
        """Show one line beside the progress: where the run writes, a warning, the end."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was found; may be called twice."""
        ...


class Updatable(Protocol):
    """A learner, as a strategy sees it."""

    model: VisionModel
    task: Task
    trained: Mapping[str, Sequence[Tensor]]  # parameters by the head whose terms reach them
    live: Mapping[str, Tensor]  # parameters and float buffers
    optimizer: Optimizer
    seed: int
    lr: float  # of the last step
    step: int
    samples: int

    @property
    def progress(self) -> float:
        """Samples seen, as a share of the whole run's."""
        ...

    def rate(self, progress: float) -> float:
        """Return the learning rate after a share of the whole run."""
        ...

    def begin(self) -> None:
        """Clear gradients, remember buffers."""
        ...

    def update(self, rate: float = 1.0) -> Tensor:
        """Clip, step by a share of the learning rate, move the EMA; return the gradient norm."""
        ...

    def note(self, norm: Tensor) -> Tensor:
        """Note an update that was applied elsewhere."""
        ...

    def average(self) -> None:
        """Move the EMA."""
        ...

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return all state as named tensors: model, ema, optimizer."""
        ...


class Fitter(Protocol):
    """A trainer, as `Strategy.drive` sees it."""

    def fit(self) -> Outcome:
        """Train to the end, or until stopped."""
        ...
