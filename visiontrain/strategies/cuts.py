"""Where a pipeline cuts a model: contiguous runs of blocks of nearly equal cost."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import IMAGE, VisionModel

PROBE = 256  # pixels a side of the image that costs are counted on


def starts(names: Sequence[str], cuts: Sequence[str], stages: int) -> list[int]:
    """Return the first block's index of each stage, from the names the user gave."""
    unknown = [cut for cut in cuts if cut not in names]
    if unknown:
        raise ConfigError(f"strategy.cuts: no block {unknown[0]!r}; blocks are {', '.join(names)}")
    found = [0, *(names.index(cut) for cut in cuts)]
    if len(found) != stages or found != sorted(set(found)):
        raise ConfigError(
            f"strategy.cuts: {list(cuts)}; take {stages - 1} different blocks in order, none first"
        )
    return found


def block_costs(meta: VisionModel) -> list[int]:
    """Count each block's multiply-adds on one image, from shapes alone.

    Args:
        meta: the model on the meta device, so that nothing is computed.
    """
    costs = dict.fromkeys(meta.blocks, 0)
    hooks = [
        module.register_forward_hook(_counter(costs, name))
        for name, block in meta.blocks.items()
        for module in block.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    meta(torch.empty(1, 3, PROBE, PROBE, device="meta", dtype=next(meta.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return list(costs.values())


def _counter(costs: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        places = output.numel() // output.shape[1]
        costs[name] += places * sum(p.numel() for p in module.parameters() if p.ndim > 1)

    return count


def balance(meta: VisionModel, stages: int) -> list[int]:
    """Return the first block's index of each stage, so that the dearest stage is cheapest.

    Of equally good cuts the one with the fewest live values is taken: less to send.
    """
    costs = block_costs(meta)

    def badness(cuts: tuple[int, ...]) -> tuple[int, int]:
        bounds = [0, *cuts, len(costs)]
        dearest = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
        return dearest, sum(len(meta.live(cut)) for cut in cuts)

    inner = itertools.combinations(range(1, len(costs)), stages - 1)
    return [0, *min(inner, key=badness)]


def live_values(meta: VisionModel, images: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return what is live before block `n` (at the end: the outputs), shapes and types only."""
    if n == 0:
        return (images,)
    names = list(meta.blocks)
    if n == len(names):
        outputs = meta(images)
        return outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(meta.run(names[:n], {IMAGE: images}, keep=meta.live(n)))
