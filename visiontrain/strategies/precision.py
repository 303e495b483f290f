"""Number formats: which one weights, images and arithmetic use, and fp16's loss scale."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

LOWER = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Of fp16's loss scale. It starts lower than usual, since losses here are sums, not means.
START, GROWTH, BACKOFF, INTERVAL = 2.0**7, 2.0, 0.5, 2000


def resolve(kind: str, device: torch.device) -> str:
    """Turn `auto` into bf16 on GPUs that have it, fp32 elsewhere (bf16 is slow on most CPUs)."""
    if kind != "auto":
        return kind
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"


def slow(kind: str, device: torch.device) -> bool:
    """Tell whether arithmetic in `kind` is emulated, or may be: on CPUs without AVX-512.

    `resnet_tiny` (widths 32, 96, 192; batch 64) trains on 164 images/s in fp32 and on 20 in bf16
    there (one thread of an AMD EPYC, torch 2.14.1); with AVX-512's bf16 it is the faster one.
    """
    return device.type == "cpu" and kind in LOWER and not get_cpu_capability().startswith("AVX512")


class Precision:
    """One number format. Gradients leave the strategy in true units whatever the format."""

    def __init__(self, kind: str, device: torch.device) -> None:
        self.kind = resolve(kind, device)
        self.weights = torch.float64 if self.kind == "fp64" else torch.float32
        self.images = self.weights
        start = START if self.kind == "fp16" else 1.0
        self.scale = torch.full((), start, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def unscale(self) -> Tensor:
        """What gradients are multiplied by to be in true units, ()."""
        return 1 / self.scale

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Run a forward pass in the lower format, if there is one."""
        lower = LOWER.get(self.kind)
        return nullcontext() if lower is None else torch.autocast(device.type, lower)

    def backward(self, total: Tensor) -> None:
        """Differentiate; fp16 gradients are scaled up so that small ones survive."""
        (total if self.kind != "fp16" else total * self.scale).backward()

    def update(self, failed: Tensor) -> None:
        """Move the loss scale after a step that `failed` (1.0) or not (0.0)."""
        if self.kind == "fp16":
            torch._amp_update_scale_(
                self.scale, self._good_steps, failed, GROWTH, BACKOFF, INTERVAL
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return what resume needs: nothing but under fp16."""
        if self.kind != "fp16":
            return {}
        return {"loss_scale": self.scale, "good_steps": self._good_steps}
