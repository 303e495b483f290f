"""Pipeline model parallel: every rank holds a run of blocks; micro-batches flow through."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, StateDict, Updatable, VisionModel
from visiontrain.core.seed import seed_model
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.strategies import comm
from visiontrain.strategies.base import detach
from visiontrain.strategies.cuts import balance, live_values, starts
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.processes import Processes

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """A run of blocks as the pipelining engine wants it: tensors in, tensors out."""

    def __init__(self, model: VisionModel, bounds: tuple[int, int], precision: Precision) -> None:
        super().__init__()
        first, last = bounds
        names = list(model.blocks)
        self.model, self.names, self.precision = model, names[first:last], precision
        self.seeds: Iterator[Sequence[int]] = iter(())  # one for each micro-batch that comes
        self.takes = model.live(first) if first else (IMAGE,)
        self.gives = model.live(last) if last < len(names) else tuple(names[-1:])

    def forward(self, *values: Tensor) -> Any:
        """Map the values that are live before the first block to those after the last.

        They travel in the type of the weights: what autocast makes of them depends on the
        blocks, and the neighbours must know it beforehand.
        """
        if self.model.training:
            seed_model(*next(self.seeds))
        with self.precision.autocast(values[0].device):
            named = dict(zip(self.takes, values, strict=True))
            given = self.model.run(self.names, named, keep=self.gives)
        flat = given[0] if isinstance(given[0], tuple) else given
        # Contiguous, as sending wants them: some blocks permute, and a view would not travel.
        wide = tuple(value.to(self.precision.weights).contiguous() for value in flat)
        return wide if len(wide) > 1 else wide[0]


class Pipeline(Processes):
    """All ranks read the same batches; M micro-batches equal M accumulation steps elsewhere."""

    _stage: Stage
    _meta: VisionModel
    _bounds: tuple[int, int]

    def __init__(
        self, place: Place, precision: Precision, schedule: str, cuts: Sequence[str] | None
    ) -> None:
        super().__init__(place, precision)
        self._schedule_class, self._cuts = SCHEDULES[schedule], cuts
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._sent: dict[tuple[int, ...], int] = {}  # bytes to the neighbours per step
        self._parts: list[Loss] = []
        self._learner: Updatable

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        """Keep this rank's blocks; the others become empty slots, so names stay the same."""
        super().setup(model)
        if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
            raise ConfigError(
                "model.norm: sync in a pipeline, where no two processes hold the same layer; "
                "take model.norm=group"
            )
        rank, world, names = self.place.rank, self.place.world, list(model.blocks)
        if len(names) < world:
            raise ConfigError(
                f"strategy.processes: {world}; the model has {len(names)} blocks to cut between"
            )
        self._meta = copy.deepcopy(model).to("meta")
        first = starts(names, self._cuts, world) if self._cuts else balance(self._meta, world)
        begin, end = [*first, len(names)][rank : rank + 2]
        self._bounds = (begin, end)
        self._stage = Stage(model, self._bounds, self.precision)
        for name in [*names[:begin], *names[end:]]:
            model.blocks[name] = nn.Identity()

    def micro_batches(self, accumulate: int) -> int:
        return max(accumulate, self.place.world)

    def collect(self, tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> StateDict:
        mine, whole = super().collect(tensors), {}
        for source in range(self.place.world):
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
        schedule = self._schedule(key)
        self._parts, self._learner = [], learner
        key_of_draws = learner.seed, learner.step, self.place.rank
        self._stage.seeds = iter([(*key_of_draws, i) for i in range(len(batches))])
        first, last = self.place.rank == 0, self.place.rank == self.place.world - 1
        schedule.step(
            arg_mbs=[(b.images,) for b in batches] if first else None,
            target_mbs=batches if last else None,
            losses=[] if last else None,
            return_outputs=False,
        )
        self.bytes_sent += self._sent[key]
        return self.divide(learner, self.total(self._parts or [self._nothing(learner)]))

    def _ready(self, batch: Batch) -> Batch:
        """Move a batch; channels first, as stages must send them and their neighbours expect."""
        batch = batch.to(self.place.device, self.precision.images)
        return replace(batch, images=batch.images.contiguous())

    def _schedule(self, key: tuple[int, ...]) -> Any:
        """Return the schedule for (micro-batches, *shape of one); a wrong shape aborts."""
        if key not in self._schedules:
            count, *shape = key
            images = torch.empty(shape, device="meta", dtype=self.precision.images)
            before = live_values(self._meta, images, self._bounds[0])
            after = live_values(self._meta, images, self._bounds[1])
            stage = PipelineStage(
                self._stage,
                self.place.rank,
                self.place.world,
                self.place.device,
                input_args=before,
                output_args=after,
            )
            forwards = 0 if stage.is_last else sum(value.nbytes for value in after)
            backwards = sum(value.nbytes for value in before if value.requires_grad)
            self._sent[key] = count * (forwards + backwards)
            self._schedules[key] = self._schedule_class(
                stage, n_microbatches=count, loss_fn=self._loss, scale_grads=False
            )
        return self._schedules[key]

    def _loss(self, outputs: Any, batch: Batch) -> Tensor:
        loss = self._learner.task.loss(outputs, batch, self._learner.progress)
        self._parts.append(detach(loss))
        return loss.total() * self.precision.scale.to(loss.total().dtype)

    def _nothing(self, learner: Updatable) -> Loss:
        """A stage without outputs adds zeros to the terms and counts."""
        zero = torch.zeros((), device=self.place.device, dtype=self.precision.weights)
        task = learner.task
        return Loss(dict.fromkeys(task.terms, zero), dict.fromkeys(task.heads, zero))

    def sum_shards(self, value: Tensor) -> Tensor:
        return comm.all_sum(value)

    # -- evaluation ---------------------------------------------------------------

    def forward(self, model: VisionModel, batch: Batch) -> Any:
        """Pass the batch from stage to stage; only the last returns outputs."""
        del model  # the stage holds this rank's part of it
        rank, last = self.place.rank, self.place.world - 1
        values: tuple[Tensor, ...] = (batch.images,)
        if rank > 0:
            images = torch.empty_like(batch.images, device="meta")
            shapes = live_values(self._meta, images, self._bounds[0])
            device = self.place.device
            values = tuple(torch.empty(s.shape, dtype=s.dtype, device=device) for s in shapes)
            for value in values:
                dist.recv(value, rank - 1)
        outputs = self._stage(*map(as_images, values))
        if rank == last:
            return outputs
        for value in outputs if isinstance(outputs, tuple) else (outputs,):
            dist.send(value.contiguous(), rank + 1)
        return None


def as_images(value: Tensor) -> Tensor:
    """Put maps' channels last in memory, as `Batch.to` puts those of images.

    Convolutions round otherwise where they come first, and scores would not be one device's.
    """
    maps = value.ndim == 4
    return value.contiguous(memory_format=torch.channels_last) if maps else value


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
