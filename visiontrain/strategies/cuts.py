"""Where a pipeline cuts a model: contiguous runs of blocks of nearly equal cost."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
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
        raise ConfigError(
            f"strategy.stages: no block {unknown[0]!r}; blocks are {', '.join(names)}"
        )
    found = [0, *(names.index(cut) for cut in cuts)]
    if len(found) != stages or found != sorted(set(found)):
        raise ConfigError(
            f"strategy.stages: {list(cuts)}; take {stages - 1} different blocks in order, none "
            "first"
        )
    return found


def shapes_of(model: VisionModel, dtype: torch.dtype) -> VisionModel:
    """Return the model on the meta device, in training, its floats of `dtype`; no value is copied.

    In evaluation, heads may look at values to know the shape of what they return.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        shape = torch.empty_like(tensor, device="meta", dtype=kind)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(model, memo).to("meta").train()


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
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)
    ]
    meta(torch.empty(1, 3, PROBE, PROBE, device="meta", dtype=next(meta.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return list(costs.values())


def _counter(costs: dict[str, int], name: str) -> Any:
    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        channels = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        places = output.numel() // channels
        costs[name] += places * sum(p.numel() for p in module.parameters() if p.ndim > 1)

    return count


def anything(stage: int, begin: int, end: int) -> bool:
    """Let every stage be."""
    del stage, begin, end
    return True


def balance(
    costs: Sequence[float],
    lives: Sequence[int],
    stages: int,
    fits: Callable[[int, int, int], bool] = anything,
) -> list[int] | None:
    """Return the first block's index of each stage, so that the dearest stage is cheapest.

    Of equally good cuts those with the least to send are taken.

    Args:
        costs: of each block.
        lives: what a cut before each block sends, bytes or values.
        stages: how many, at most one per block.
        fits: tells whether a stage may have the blocks from one to before another.

    Returns:
        None where no cuts fit.
    """
    sums = list(itertools.accumulate(costs, initial=0))
    # best[n]: (dearest stage, what is sent, cuts) of blocks up to n in the stages so far.
    best = {n: (sums[n], 0, (0,)) for n in range(1, len(sums)) if fits(0, 0, n)}
    for stage in range(1, stages):
        found = {
            n: [
                (
                    max(best[cut][0], sums[n] - sums[cut]),
                    best[cut][1] + lives[cut],
                    (*best[cut][2], cut),
                )
                for cut in range(stage, n)
                if cut in best and fits(stage, cut, n)
            ]
            for n in range(stage + 1, len(sums))
        }
        best = {n: min(several) for n, several in found.items() if several}
    return list(best[len(sums) - 1][2]) if len(sums) - 1 in best else None


def counted(meta: VisionModel, stages: int) -> list[int]:
    """Balance multiply-adds, where nothing was measured."""
    lives = [len(meta.live(n)) for n in range(len(meta.blocks))]
    found = balance(block_costs(meta), lives, stages)
    assert found is not None  # nothing was refused
    return found


def live_values(meta: VisionModel, images: Tensor, n: int) -> tuple[Tensor, ...]:
    """Return what is live before block `n` (at the end: the outputs), shapes and types only.

    Contiguous, as stages send them.
    """
    if n == 0:
        return (images,)
    names = list(meta.blocks)
    if n == len(names):
        outputs = meta(images)
        values = outputs if isinstance(outputs, tuple) else (outputs,)
    else:
        values = tuple(meta.run(names[:n], {IMAGE: images}, keep=meta.live(n)))
    return tuple(value.contiguous() for value in values)
