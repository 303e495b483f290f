"""Data parallel: every rank holds the model and reads its share of each batch."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from visiontrain.core.interfaces import VisionModel
from visiontrain.strategies import comm
from visiontrain.strategies.processes import Processes


class DDP(Processes):
    """Replicated parameters; gradients are summed over ranks during backward."""

    _wrapped: DistributedDataParallel

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
        self._wrapped.register_comm_hook(self, sum_bucket)

    def train_forward(self, model: VisionModel, images: Tensor, **given: Tensor) -> Any:
        del model  # the wrapper holds it
        return self._wrapped(images, **given)

    def grad_sync(self, *, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext() if enabled else self._wrapped.no_sync()

    def sync_buffers(self, model: VisionModel) -> None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def sum_bucket(strategy: DDP, bucket: dist.GradBucket) -> Future[Tensor]:
    """Sum a bucket over ranks. DDP's own hook takes the mean, but terms here are sums."""
    strategy.bytes_sent += 2 * comm.ring_bytes(bucket.buffer().nbytes, strategy.place.world)
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
