"""Which of a learner's tensors each server holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import Updatable, VisionModel


def parts_of(model: VisionModel, servers: int) -> Sequence[Sequence[str]]:
    """Return which parameters and float buffers each server holds: about as many bytes each.

    Raises:
        ConfigError: there are more servers than tensors.
    """
    live = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    if len(live) < servers:
        raise ConfigError(
            f"strategy.servers: {servers} for a model of {len(live)} tensors; take fewer"
        )
    return split({name: tensor.nbytes for name, tensor in live.items()}, servers)


def split(sizes: Mapping[str, int], parts: int) -> Sequence[list[str]]:
    """Deal names out to `parts`, the largest first, each to whoever has the fewest bytes.

    Whole tensors: an optimizer may need the whole matrix (Muon). Names keep their order.
    """
    held: list[tuple[int, list[str]]] = [(0, []) for _ in range(parts)]
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = min(range(parts), key=lambda k: held[k][0])
        size, names = held[least]
        held[least] = (size + sizes[name], [*names, name])
    return [[name for name in sizes if name in set(names)] for _, names in held]


def trained_in(learner: Updatable, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the parameters with these names that train, in the model's order."""
    held = frozenset(names)
    named = learner.model.named_parameters()
    return {n: p for n, p in named if n in held and p.requires_grad}


def is_held(key: str, names: frozenset[str]) -> bool:
    """Tell whether a tensor of a learner's state belongs to parameters with these names."""
    part, _, name = key.partition("/")
    return (name.rpartition(".")[0] if part == "optimizer" else name) in names
