"""Bytes of the tensors that are alive while something runs, and the most there were at once."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Storage = torch.UntypedStorage


class LiveBytes(TorchDispatchMode):
    """Counts each storage once, from the operation that makes it to the end of its last tensor.

    What was there before is told by `add`. Memory that kernels take for themselves, and what the
    allocator keeps, is in no tensor and not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Storage]] = {}

    def __enter__(self) -> Self:
        self._resize = Storage.resize_
        Storage.resize_ = self._resized()  # FSDP2 empties storages whose tensors stay
        return super().__enter__()

    def __exit__(self, exc_type: Any, exc_val: Any, exc_tb: Any) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        Storage.resize_ = self._resize

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation; count what it returns."""
        del types
        result = func(*args, **(kwargs or {}))
        self.add(value for value in tree_leaves(result) if isinstance(value, Tensor))
        return result

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that nobody has counted yet."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if local.device.type != "meta":
                self._count(local.untyped_storage())

    def restart(self) -> None:
        """Forget the peak: it begins with what is alive."""
        self.peak = self.now

    def _count(self, storage: Storage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._watched[key] = weakref.ref(storage, lambda _: self._set(key, None))
        self._set(key, storage.nbytes())

    def _set(self, key: int, size: int | None) -> None:
        """Note how large a storage is now; None: it is gone."""
        before = self._sizes.pop(key, 0)
        if size is None:
            self._watched.pop(key, None)
        else:
            self._sizes[key] = size
        self.now += (size or 0) - before
        self.peak = max(self.peak, self.now)

    def _resized(self) -> Any:
        resize = self._resize

        def watched(storage: Storage, size: int) -> Any:
            result = resize(storage, size)
            self._count(storage)
            return result

        return watched
