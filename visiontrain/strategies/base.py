"""What a training mode may change, and the one-device mode, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Fitter, StateDict, Updatable, VisionModel
from visiontrain.core.recompute import unmoved
from visiontrain.core.seed import seed_model
from visiontrain.core.types import Batch, Loss, Outcome, Piece, Place
from visiontrain.data.loader import Step
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.synced import join_without_images

NamedParts = Mapping[str, Mapping[str, Tensor]]  # model, ema and optimizer: tensors by name
DROPPED = (
    "what each process had for itself (gradients it still owed, or weights of its own) is left "
    "out: the mode or the number of processes is another now"
)
T = TypeVar("T")


class Strategy:
    """How training is spread over processes and devices. Base behaviour: one device.

    A mode overrides only the verbs it changes. Nothing outside this package asks for a rank
    or imports torch.distributed. `learner.model` is the plain VisionModel in every mode; a
    wrapper stays in here.
    """

    def __init__(self, place: Place, precision: Precision) -> None:
        self.place = place
        self.precision = precision
        self.bytes_sent = 0  # by this process to others, since the run began
        self.starting = 0.0  # seconds of steps since a trainer looked in which others were starting
        self.apart = False  # whether ranks hold different weights between steps
        # Whether this process was asked to stop; what waits for long may then raise Stopped.
        self.stopping: Callable[[], bool] = lambda: False

    @property
    def reads_first(self) -> bool:
        """Whether no rank before this one reads the same share of each batch."""
        return True

    @property
    def shares(self) -> int:
        """Into how many shares a micro-batch is cut."""
        return self.place.shard[1]

    # -- the model ----------------------------------------------------------------

    def setup(self, model: VisionModel) -> None:
        """Place, wrap, shard or cut the model, in place; before the optimizer is built.

        Raises:
            ConfigError: the model cannot train in this mode or on this device.
        """
        self.put(model, self.place.device)

    def put(self, module: nn.Module, device: torch.device) -> None:
        """Move what is to train to a device.

        Raises:
            ConfigError: it cannot train there.
        """
        if is_synced(module) and device.type == "cpu":
            raise ConfigError("model.norm: sync on the CPU; torch has it for GPUs, take group")
        join_without_images(module)
        module.to(device, self.precision.weights)

    def local(self, tensor: Tensor) -> Tensor:
        """Return what this process holds of a parameter, gradient or state."""
        return tensor

    def collect(self, tensors: Mapping[str, Tensor], *, everywhere: bool = True) -> StateDict:
        """Return whole copies on the CPU, under the same names in every mode. Collective.

        Args:
            tensors: by name, as this process holds them.
            everywhere: whether all processes need them; else all but the main one get none.
        """
        if not (everywhere or self.place.is_main):
            return {}
        return {name: on_cpu(tensor) for name, tensor in tensors.items()}

    def shard(self, tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
        """Copy to the CPU what this process writes of a state that all write together."""
        if not self.place.is_main:
            return {}
        return {n: Piece(on_cpu(t), 0, tuple(t.shape)) for n, t in tensors.items()}

    def scatter(self, whole: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy whole tensors into what this process holds. Inverse of `collect`. Collective."""
        with torch.no_grad():
            for name, tensor in into.items():
                tensor.copy_(whole[name])

    def sync_buffers(self, model: VisionModel) -> None:
        """Make buffers equal on all ranks, before evaluating or saving. Collective."""

    def level(self, model: VisionModel) -> None:
        """Make what is about to be scored equal on all ranks. Collective."""
        self.sync_buffers(model)

    def collect_own(self, named: NamedParts) -> StateDict:
        """Return what belongs to this mode, on the main rank. Collective.

        Args:
            named: the learner's tensors, as `Learner.tensors` gives them.
        """
        del named
        # Never a mean over ranks: a loss scale is a power of two.
        own = self.precision.tensors() if self.place.is_main else {}
        return {name: on_cpu(tensor) for name, tensor in own.items()}

    def load_own(self, saved: Mapping[str, Tensor], named: NamedParts) -> str | None:
        """Take back what `collect_own` returned; say what could not be used. Collective."""
        del named
        mine = self.precision.tensors()
        if mine.keys() <= saved.keys():  # else the run had another precision
            self.scatter(saved, mine)
        owned = any(name.startswith("rank") for name in saved)
        return DROPPED if owned else None

    def micro_batches(self, accumulate: int) -> int:
        """Return into how many micro-batches each step's batch is cut."""
        return accumulate

    # -- the step -----------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """Leave the gradient of the whole batch in `.grad`; return its terms and counts.

        Gradients of all micro-batches and ranks are summed, then divided by the summed count
        of the head each parameter answers to.
        """
        parts: list[Loss] = []
        whole: Loss | None = None
        for i, micro_batch in enumerate(micro_batches):
            batch = micro_batch.to(self.place.device, self.precision.images)
            seed_model(learner.seed, learner.step, self.cell(i))
            real = bool(micro_batch.valid.any())  # on the CPU: nothing waits for a GPU
            still = nullcontext() if real else unmoved(learner.model)
            batch = batch if real else filler(batch, learner.model)
            last = i == len(micro_batches) - 1
            with self.grad_sync(enabled=last), still:
                with self.precision.autocast(self.place.device):
                    given = {name: getattr(batch, name) for name in learner.model.reads}
                    outputs = self.train_forward(learner.model, batch.images, **given)
                loss = learner.task.loss(outputs, batch, learner.progress)
                parts.append(detach(loss))
                if last:
                    whole = self.early_total(parts)
                self.precision.backward(loss.total())
        return self.divide(learner, whole or self.total(parts))

    def train_forward(self, model: VisionModel, images: Tensor, **given: Tensor) -> Any:
        """Run the model for training, through the wrapper if there is one."""
        return model(images, **given)

    def cell(self, micro_batch: int) -> int:
        """Number this process's micro-batch among those of all ranks."""
        index, total = self.place.shard
        return micro_batch * total + index

    def total(self, parts: Sequence[Loss]) -> Loss:
        """Add losses up over micro-batches and ranks, in one small collective."""
        return add_up(parts, self.sum)

    def early_total(self, parts: Sequence[Loss]) -> Loss | None:
        """Return `total` before the last backward pass, where gradients then want the counts.

        None elsewhere: there ranks would wait for each other once more.
        """
        del parts

    def divide(self, learner: Updatable, loss: Loss) -> Loss:
        """Divide gradients and terms by the counts of the whole batch, in place."""
        shares = {head: 1 / count.clamp(min=1) for head, count in loss.counts.items()}
        for head, share in shares.items():
            grads = [self.local(p.grad) for p in learner.trained[head] if p.grad is not None]
            for device, here in by_device(grads).items():
                factor = share.to(here[0].dtype) * self.precision.unscale
                torch._foreach_mul_(here, factor.to(device))
        return self.mean(loss)

    def mean(self, loss: Loss) -> Loss:
        """Divide terms by the counts of their heads."""
        terms = {
            name: value / loss.counts[name.split("/")[0]].clamp(min=1)
            for name, value in loss.terms.items()
        }
        return Loss(terms, loss.counts)

    def grad_sync(self, *, enabled: bool) -> AbstractContextManager[None]:
        """Hold back gradient communication for all but the last micro-batch."""
        del enabled
        return nullcontext()

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm over all parameters everywhere; return that norm ()."""
        norm = self.sum_shards(self.squared_norm(model)).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        grads = [self.local(p.grad) for p in model.parameters() if p.grad is not None]
        for device, here in by_device(grads).items():
            torch._foreach_mul_(here, factor.to(device))
        return norm

    def squared_norm(self, model: nn.Module) -> Tensor:
        """Return the squared norm () of the gradients that this process holds."""
        grads = [self.local(p.grad) for p in model.parameters() if p.grad is not None]
        device = grads[-1].device if grads else self.place.device  # the CPU, when offloaded
        none = torch.zeros((), device=device, dtype=self.precision.weights)
        groups = by_device(grads).values()
        norms = [norm.to(device) for here in groups for norm in torch._foreach_norm(here)]
        # A pipeline's stage may be frozen whole, and then has no gradient.
        return torch.stack([none, *norms]).square().sum()

    def sum_shards(self, value: Tensor) -> Tensor:
        """Sum over the processes that hold different parameters."""
        return value

    def apply(self, learner: Updatable) -> Tensor:
        """Turn gradients into new parameters, here or elsewhere; return their norm ()."""
        return learner.update()

    # -- evaluation ---------------------------------------------------------------

    @property
    def holds_outputs(self) -> bool:
        """Whether `forward` returns outputs here, and not on another process."""
        return True

    def forward(self, model: VisionModel, batch: Batch) -> Any:
        """Run the model for evaluation; None on a process that holds no outputs."""
        with self.precision.autocast(self.place.device):
            return model(batch.images)

    # -- figures ------------------------------------------------------------------

    def numbers(self) -> dict[str, float]:
        """Return what an epoch's row of results.csv says of this mode alone."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Return what metrics.json says of this mode alone: JSON; checkpoints keep it."""
        return {}

    def describe(self, clients: Sequence[Sequence[int]]) -> None:
        """Note how many images of each class the clients of a federated run have."""

    def conclude(self, learner: Updatable) -> None:
        """Score in other places, too, once the weights that the run reports are the learner's."""

    def load_summary(self, summary: Mapping[str, Any]) -> None:
        """Go on counting from what `summary` returned, of this mode or another."""

    def peaks(self, mine: float) -> list[float]:
        """Return the peak memory of all processes, given this one's, in any unit. Collective."""
        return self.gather(torch.tensor([[mine]], dtype=torch.float64)).flatten().tolist()

    # -- talk ---------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different data."""
        return values

    def any(self, *, flag: bool) -> bool:
        """Tell whether `flag` is set on any rank. Collective."""
        return flag

    def broadcast(self, value: Any) -> Any:
        """Return the main rank's JSON value on every rank. Collective."""
        return value

    def gather(self, rows: Tensor) -> Tensor:
        """Return every rank's rows (K, columns), stacked, on every rank. Collective."""
        return rows

    def share(self, tensors: StateDict) -> StateDict:
        """Return the main rank's tensors on every rank, on the CPU. Collective."""
        return tensors

    def together(self, make: Callable[[], T]) -> T:
        """Return what `make` returns here; where it fails on one rank, fail on all. Collective.

        Raises:
            VisiontrainError: what `make` raised; with its host, where other ranks did not fail.
        """
        return make()

    # -- the run ------------------------------------------------------------------

    def steps(
        self,
        local: Callable[[], Iterator[Step]],
        blank: Callable[[], Iterator[Step]],
        rests: Callable[[int], bool],
    ) -> Iterator[Step]:
        """Yield the steps of a run.

        Args:
            local: yields them with this process's share of the images.
            blank: yields them without.
            rests: tells whether anything is scored or saved after a step.
        """
        del blank, rests
        return local()

    def running(self) -> AbstractContextManager[None]:
        """Hold what the mode needs while a run goes on."""
        return nullcontext()

    def drive(self, fitter: Fitter) -> Outcome:
        """Run the whole training. Rounds, servers and clients live in overrides."""
        with self.running():
            return fitter.fit()


def add_up(parts: Sequence[Loss], over_ranks: Callable[[Tensor], Tensor]) -> Loss:
    """Add losses up over micro-batches, and over ranks with `over_ranks` (N,) -> (N,)."""
    names = [*parts[0].terms, *parts[0].counts]
    rows = [torch.stack([*part.terms.values(), *part.counts.values()]) for part in parts]
    values = dict(zip(names, over_ranks(torch.stack(rows).sum(0)).unbind(), strict=True))
    terms = {name: values[name] for name in parts[0].terms}
    return Loss(terms, {name: values[name] for name in parts[0].counts})


def by_device(tensors: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Group tensors by where they lie: kernels for lists take those of one device."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    return groups


def is_synced(model: nn.Module) -> bool:
    """Tell whether layers normalise over the images of all ranks."""
    return any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())


def filler(batch: Batch, model: VisionModel) -> Batch:
    """Return what a rank without data runs on: no image, where it would be in all statistics.

    torchvision's networks, which read targets, cannot do without one.
    """
    if not is_synced(model) or model.reads:
        return batch
    return Batch(*(getattr(batch, name)[:0] for name in Batch.__slots__))


def on_cpu(tensor: Tensor) -> Tensor:
    """Return a copy that nothing else changes."""
    return tensor.detach().to("cpu", copy=True)


def detach(loss: Loss) -> Loss:
    """Cut a loss from its graph."""
    terms = {name: value.detach() for name, value in loss.terms.items()}
    return Loss(terms, {name: value.detach() for name, value in loss.counts.items()})
