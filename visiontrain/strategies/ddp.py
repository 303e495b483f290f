"""Data parallel: every rank holds the model and reads its share of each batch."""

import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from visiontrain.core.interfaces import StateDict, Updatable, VisionModel
from visiontrain.core.types import Batch, Loss, Place
from visiontrain.strategies import comm
from visiontrain.strategies import config as settings
from visiontrain.strategies.aggregate import Robust
from visiontrain.strategies.base import DROPPED, NamedParts, add_up
from visiontrain.strategies.compress import COMPRESSIONS, HALVES
from visiontrain.strategies.config import SPARSE
from visiontrain.strategies.exchange import Bucket, Exchange, Plain
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.processes import Processes
from visiontrain.strategies.wire import Wire


class DDP(Processes):
    """Replicated parameters; gradients are summed over ranks during backward.

    Whether the sum is all of each rank's gradient, what robust rules make of them, or what
    compression lets through, is up to the exchange.
    """

    _wrapped: DistributedDataParallel
    _learner: Updatable

    def __init__(self, place: Place, precision: Precision, config: settings.DDP) -> None:
        super().__init__(place, precision)
        self._config = config
        self._shares: Mapping[str, Tensor] = {}  # what gradients of each head are multiplied by
        self._names: dict[Tensor, str] = {}

    def setup(self, model: VisionModel) -> None:
        super().setup(model)
        # With channels last, depthwise gradients have another stride in their dimension of one.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        device = self.place.device
        # Buffers are made equal before evaluating and saving; torch renamed the key in 2.13.
        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
        key = "forward_sync_buffers" if version >= (2, 13) else "broadcast_buffers"
        keys: dict[str, Any] = {key: False}
        ids = [device] if device.type == "cuda" else None
        self._wrapped = DistributedDataParallel(model, device_ids=ids, **keys)
        # Held weakly: through torch's C++ the wrapper would else keep the whole mode alive.
        self._wrapped.register_comm_hook(weakref.ref(self), exchange_bucket)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        inner = self._config.inner or self._config.processes
        self._wire = Wire(self.place, self._config.topology, inner)
        self._plain = Plain(self._wire)
        self._later = build_exchange(self._config, self._wire)
        self._exchange: Exchange = self._plain

    # -- the step -----------------------------------------------------------------

    def forward_backward(self, learner: Updatable, micro_batches: Sequence[Batch]) -> Loss:
        """As one device does; the exchange comes in when backward has a bucket full."""
        self._learner = learner
        # Never plain where a rule is to hold: one wrong gradient is enough.
        early = self._config.compress in SPARSE and learner.progress < self._config.compress_after
        self._exchange = self._plain if early else self._later
        loss = super().forward_backward(learner, micro_batches)
        self.bytes_sent += self._wire.take()
        return loss

    def train_forward(self, model: VisionModel, images: Tensor, **given: Tensor) -> Any:
        del model  # the wrapper holds it
        return self._wrapped(images, **given)

    def grad_sync(self, *, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext() if enabled else self._wrapped.no_sync()

    def early_total(self, parts: Sequence[Loss]) -> Loss | None:
        if self._exchange.units == "sums":
            return None
        whole = self.total(parts)
        own = self._exchange.units == "own"
        counts = add_up(parts, lambda values: values).counts if own else whole.counts
        self._shares = {head: 1 / count.clamp(min=1) for head, count in counts.items()}
        return whole

    def exchange(self, bucket: Bucket) -> Future[Tensor]:
        """Bring a bucket into the units that the exchange wants, and hand it over."""
        if self._exchange.units != "sums":
            heads = [self._learner.task.head_of(name) for name in bucket.names]
            for grad, head in zip(bucket.grads, heads, strict=True):
                grad.mul_(self._shares[head].to(grad.dtype) * self.precision.unscale)
        return self._exchange.reduce(bucket)

    def named(self, parameters: Sequence[Tensor]) -> list[str]:
        """Name parameters as the model does."""
        return [self._names[parameter] for parameter in parameters]

    def divide(self, learner: Updatable, loss: Loss) -> Loss:
        """Divide what the exchange left as sums."""
        if self._exchange.units == "sums":
            return super().divide(learner, loss)
        return self.mean(loss)

    def apply(self, learner: Updatable) -> Tensor:
        norm = learner.update()
        for memory in self._exchange.memories.values():
            memory.settle(torch.isfinite(norm))
        return norm

    # -- state --------------------------------------------------------------------

    @property
    def _way(self) -> str:
        """What memories are good for: another compression, or rank, keeps others."""
        return f"{self._config.compress}-{self._config.powersgd_rank}"

    def sync_buffers(self, model: VisionModel) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

    def collect_own(self, named: NamedParts) -> StateDict:
        """Add what the exchange remembers, of each rank."""
        memories = self._later.memories.items()
        own = {
            f"{self._way}/{kind}/{name}": tensor
            for kind, memory in memories
            for name, tensor in memory.state().items()
        }
        return super().collect_own(named) | comm.gather_named(own, self.place.device)

    def load_own(self, saved: Mapping[str, Tensor], named: NamedParts) -> str | None:
        """Take it back, if there were as many ranks."""
        super().load_own(saved, named)
        mine = comm.own_part(saved, self.place.rank, self.place.world)
        if mine is None or not all(name.startswith(f"{self._way}/") for name in mine):
            return DROPPED
        for kind, memory in self._later.memories.items():
            held = comm.under(mine, f"{self._way}/{kind}/")
            memory.load({name: tensor.to(self.place.device) for name, tensor in held.items()})
        return None


def build_exchange(config: settings.DDP, wire: Wire) -> Exchange:
    """Make what the keys of `strategy` ask for."""
    if config.aggregate == "mean":
        return COMPRESSIONS[config.compress](config, wire)
    return Robust(wire, config.aggregate, config.faulty, HALVES.get(config.compress))


def exchange_bucket(held: weakref.ref[DDP], bucket: dist.GradBucket) -> Future[Tensor]:
    """Exchange a bucket. DDP's own hook takes the mean over ranks, but terms here are sums."""
    strategy = held()
    if strategy is None:
        raise RuntimeError("a backward pass after its strategy is gone")
    names = strategy.named(bucket.parameters())
    return strategy.exchange(
        Bucket(bucket.buffer(), names, bucket.gradients(), last=bucket.is_last())
    )
