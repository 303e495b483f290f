"""Pipeline model parallel: every rank holds a run of blocks; micro-batches flow through."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import StateDict, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.strategies import comm
from visiontrain.strategies import config as settings
from visiontrain.strategies.base import detach
from visiontrain.strategies.cuts import counted, live_values, shapes_of, starts
from visiontrain.strategies.grid import Grid, form
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.processes import Processes
from visiontrain.strategies.stage import PER_PROCESS, Border, Stage, check_cuts, owner

Values = tuple[Tensor, ...]  # that go from stage to stage
SCHEDULES: Mapping[str, Callable[..., Any]] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved_1f1b": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
}


class Pipeline(Processes):
    """All ranks read the same batches; M micro-batches equal M accumulation steps elsewhere.

    With `data_parallel` several such pipelines stand side by side, each on its share of a batch;
    processes that hold the same stages add their gradients up after each step.
    """

    _stages: list[Stage]  # of this process, in order
    _meta: VisionModel
    _grid: Grid

    def __init__(self, place: Place, precision: Precision, config: settings.Pipeline) -> None:
        super().__init__(place, precision)
        self._config, self._kind = config, config.schedule
        self._depth = place.world // config.data_parallel  # processes of a pipeline
        self._count = PER_PROCESS[config.schedule] * self._depth  # of stages
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._sent: dict[tuple[int, ...], int] = {}  # bytes to the neighbours per step
        self._parts: list[Loss] = []
        self._batches: Sequence[Batch] = ()  # of the step
        self._learner: Updatable

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        """Keep this rank's blocks; the others become empty slots, so names stay the same.

        Only what is kept is placed: no device has to have room for all of it.
        """
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise ConfigError(
                "model.norm: sync in a pipeline, where no two processes hold the same layer; "
                "take model.norm=group"
            )
        if self._kind == "zbv" and torch.__version__ < "2.12":
            raise ConfigError(
                f"strategy.schedule: zbv with torch {torch.__version__}, whose engine then sends "
                "from a process to itself; take torch 2.12 or newer, or zero_bubble"
            )
        names, count = list(model.blocks), self._count
        check_cuts(self._config, names, self.place.world)
        self._grid = form(self.place, self._config.data_parallel)
        self._meta = shapes_of(model, self.precision.weights)
        chosen = self._config.stages
        first = counted(self._meta, count) if chosen == "auto" else starts(names, chosen, count)
        bounds = list(pairwise([*first, len(names)]))
        self._stages = [
            Stage(model, number, bounds[number], self.precision)
            for number in range(count)
            if self._owner(number) == self._grid.place
        ]
        mine = {name for stage in self._stages for name in stage.names}
        for name in names:
            if name not in mine:
                model.blocks[name] = nn.Identity()
        super().setup(model)

    @property
    def reads_first(self) -> bool:
        return self._grid.place == 0

    def micro_batches(self, accumulate: int) -> int:
        return max(accumulate, self._depth)

    def sync_buffers(self, model: VisionModel) -> None:
        self._grid.copy_column(list(model.buffers()))

    def collect(self, tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> StateDict:
        mine, whole = super().collect(tensors), {}
        for source in range(self._depth):  # the first pipeline's
            got = comm.broadcast_tensors(mine, self.place.device, source)
            whole |= got if everywhere or self.place.is_main else {}
        return whole

    # -- the step -----------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """Run one schedule: every stage's forward and backward over all micro-batches."""
        size = max(len(b) for b in micro_batches)
        image = micro_batches[0].images[:1]  # shares of a batch put the larger ones first
        batches = [self._ready(fill(b, size, image)) for b in micro_batches]
        key = (len(batches), *batches[0].images.shape)
        is_new = key not in self._schedules
        schedule = self._schedule(key)
        self._parts, self._learner = [], learner
        for stage in self._stages:
            cells = map(self.cell, range(len(batches)))
            stage.seeds = iter([(learner.seed, learner.step, stage.number, n) for n in cells])
        first, last = self._holds(0), self._holds(self._count - 1)
        # The engine cuts whole batches evenly, which all versions do: of targets it gets numbers.
        self._batches = batches
        schedule.step(
            *([torch.cat([b.images for b in batches])] if first else []),
            target=torch.arange(len(batches)) if last else None,
            losses=[] if last else None,
            return_outputs=False,
        )
        self._batches = ()
        if is_new and self._kind in settings.HALVING:
            refuse_lost(learner.model, self._kind)
        trained = learner.trained.values()  # walking through the modules takes longer
        grads = [p.grad for several in trained for p in several if p.grad is not None]
        self.bytes_sent += self._sent[key] + self.add_up(grads)
        return self.divide(learner, self.total(self._parts or [self._nothing(learner)]))

    def add_up(self, gradients: Sequence[Tensor]) -> int:
        """Add gradients up over pipelines; return the bytes sent for it. Collective."""
        return 2 * comm.ring_bytes(self._grid.sum_column(gradients), self._grid.copies)

    def _owner(self, stage: int) -> int:
        return owner(stage, self._kind, self._depth)

    def _holds(self, stage: int) -> bool:
        return any(mine.number == stage for mine in self._stages)

    def _ready(self, batch: Batch) -> Batch:
        """Move a batch; channels first, as stages must send them and their neighbours expect."""
        batch = batch.to(self.place.device, self.precision.images)
        return replace(batch, images=batch.images.contiguous())

    def _schedule(self, key: tuple[int, ...]) -> Any:
        """Return the schedule for (micro-batches, *shape of one); a wrong shape aborts."""
        if key not in self._schedules:
            count, *shape = key
            images = torch.empty(shape, device="meta", dtype=self.precision.images)
            self._meta.train()  # evaluation leaves it in another mode
            around = [
                [live_values(self._meta, images, place) for place in stage.bounds]
                for stage in self._stages
            ]
            pairs = list(zip(self._stages, around, strict=True))
            stages = [self._engine_stage(stage, *values) for stage, values in pairs]
            self._sent[key] = count * sum(self._bytes(stage, *values) for stage, values in pairs)
            several = PER_PROCESS[self._kind] > 1
            self._schedules[key] = SCHEDULES[self._kind](
                stages if several else stages[0],
                n_microbatches=count,
                loss_fn=self._loss,
                scale_grads=False,
            )
        return self._schedules[key]

    def _engine_stage(self, stage: Stage, before: Values, after: Values) -> PipelineStage:
        """Make what the engine runs; what comes and goes, shapes and types only."""
        whole = stage.number > 0 and not all(value.requires_grad for value in before)
        return PipelineStage(
            stage,
            stage.number,
            self._count,
            self.place.device,
            input_args=before,
            output_args=after,
            group=self._grid.row,
            dw_builder=whole_backward if whole else None,
        )

    def _bytes(self, stage: Stage, before: Values, after: Values) -> int:
        """Count what a stage sends to other processes for one micro-batch."""
        sent = 0
        if stage.number < self._count - 1 and not self._holds(stage.number + 1):
            sent += sum(value.nbytes for value in after)
        if stage.number and not self._holds(stage.number - 1):
            sent += sum(value.nbytes for value in before if value.requires_grad)
        return sent

    def _loss(self, outputs: Any, number: Tensor) -> Tensor:
        """Return the loss of a micro-batch, which the engine names by its number (1,)."""
        batch = self._batches[int(number)]
        flat = outputs if isinstance(outputs, tuple) else (outputs,)
        flat = tuple(map(Border.apply, flat))  # the engine cuts off what came, saved or not
        outputs = flat if isinstance(outputs, tuple) else flat[0]
        loss = self._learner.task.loss(outputs, batch, self._learner.progress)
        self._parts.append(detach(loss))
        return loss.total() * self.precision.scale.to(loss.total().dtype)

    def _nothing(self, learner: Updatable) -> Loss:
        """A stage without outputs adds zeros to the terms and counts."""
        zero = torch.zeros((), device=self.place.device, dtype=self.precision.weights)
        task = learner.task
        return Loss(dict.fromkeys(task.terms, zero), dict.fromkeys(task.heads, zero))

    def sum_shards(self, value: Tensor) -> Tensor:
        return self._grid.sum_row(value)

    # -- evaluation ---------------------------------------------------------------

    @property
    def holds_outputs(self) -> bool:
        return self._holds(self._count - 1)

    def forward(self, model: VisionModel, batch: Batch) -> Any:
        """Pass the batch from stage to stage; only the holder of the last returns outputs."""
        del model  # the stages hold this rank's part of it
        values: tuple[Tensor, ...] = (batch.images,)
        for stage in self._stages:
            if stage.number and not self._holds(stage.number - 1):
                values = self._received(stage, batch.images)
            outputs = stage(*map(as_images, values))
            values = outputs if isinstance(outputs, tuple) else (outputs,)
            if stage.number == self._count - 1:
                return outputs
            if not self._holds(stage.number + 1):
                for value in values:
                    dist.send(value.contiguous(), self._grid.peer(self._owner(stage.number + 1)))
        return None

    def _received(self, stage: Stage, images: Tensor) -> tuple[Tensor, ...]:
        """Wait for what the stage before sends."""
        self._meta.eval()  # in training BatchNorm refuses an image whose map is one place
        shapes = live_values(self._meta, torch.empty_like(images, device="meta"), stage.bounds[0])
        values = tuple(
            torch.empty(s.shape, dtype=s.dtype, device=self.place.device) for s in shapes
        )
        for value in values:
            dist.recv(value, self._grid.peer(self._owner(stage.number - 1)))
        return values


def as_images(value: Tensor) -> Tensor:
    """Put maps' channels last in memory, as `Batch.to` puts those of images.

    Convolutions round otherwise where they come first, and scores would not be one device's.
    """
    maps = value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if maps else value


def whole_backward() -> Callable[[], None]:
    """Have the engine never cut a stage's backward pass in two.

    The weights' half goes along the way to the stage's inputs: what lies beside that way, as
    behind frozen blocks, would get no gradient.
    """
    return lambda: None


def refuse_lost(model: VisionModel, schedule: str) -> None:
    """Refuse a backward pass in two halves where parameters got no gradient from it.

    Raises:
        ConfigError: naming one.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise ConfigError(
                f"strategy.schedule: {schedule}; {name} depends on nothing that comes from the "
                "stage before, and gets no gradient so; take 1f1b"
            )


def fill(batch: Batch, size: int, image: Tensor) -> Batch:
    """Bring a batch to `size` images; the new ones are `valid=0`, and look like `image`.

    A real image, since BatchNorm takes its statistics from all of them.
    """
    missing = size - len(batch)
    real = batch.valid > 0
    if not missing and real.all():
        return batch
    images = torch.where(real[:, None, None, None], batch.images, image)

    def grow(tensor: Tensor, value: float) -> Tensor:
        return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])

    return Batch(
        images=torch.cat([images, image.expand(missing, -1, -1, -1)]),
        targets=grow(batch.targets, -1),
        ids=grow(batch.ids, -1),
        frame=grow(batch.frame, 1),
        valid=grow(batch.valid, 0),
    )
