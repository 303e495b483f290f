"""What a few training steps saw and did, in a form that two trainings can be compared by."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.backends import cudnn

from visiontrain.core.errors import ConfigError
from visiontrain.core.interfaces import StateDict
from visiontrain.core.seed import generator
from visiontrain.core.types import Batch
from visiontrain.data.loader import Step
from visiontrain.engine.learner import Learner
from visiontrain.engine.step import train_step

Numbers = dict[str, float]


@dataclass(frozen=True, slots=True)
class Trace:
    """N steps of one training; the same on every process."""

    samples: Sequence[Sequence[float]]  # sorted rows: step, id, checksums of pixels, of targets
    terms: Sequence[Numbers]  # per step
    counts: Sequence[Numbers]  # per step: what the assignment gave each head
    norms: Sequence[float]  # per step, before clipping
    tensors: StateDict  # model/*, ema/*, optimizer/* at the end; first/*, last/*: gradients

    def part(self, name: str) -> StateDict:
        """Return the tensors of one part by their names within it."""
        start = f"{name}/"
        return {k.removeprefix(start): t for k, t in self.tensors.items() if k.startswith(start)}

    def save(self, folder: Path) -> None:
        """Write into `folder`: numbers as JSON, tensors as safetensors."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        (folder / "trace.json").write_text(json.dumps(numbers))
        # After a single step its gradient is the first and the last, and files share nothing.
        own = {k: t.clone() if k.startswith("last/") else t for k, t in self.tensors.items()}
        save_file(own, folder / "trace.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Trace:
        """Read what `save` wrote."""
        numbers = json.loads((folder / "trace.json").read_text())
        return cls(**numbers, tensors=load_file(folder / "trace.safetensors"))


def record(learner: Learner, steps: Iterable[Step], count: int) -> Trace:
    """Train `count` steps and note what happened. Collective; the learner is used up.

    Raises:
        ConfigError: the run has fewer steps.
    """
    strategy = learner.strategy
    seen: list[Tensor] = []
    results: list[tuple[Numbers, Numbers, float]] = []
    gradients: dict[str, StateDict] = {}
    for step in itertools.islice(steps, count):
        if strategy.reads_first:
            seen += [fingerprints(step.step, batch) for batch in step.micro_batches]
        result = train_step(learner, step.micro_batches, step.images)
        terms = {name: value.item() for name, value in result.terms.items()}
        counts = {name: value.item() for name, value in result.counts.items()}
        results.append((terms, counts, result.grad_norm.item()))
        if len(results) in (1, count):  # collecting takes as long as a step
            gradients["last"] = _gradients(learner)
            gradients.setdefault("first", gradients["last"])
    if len(results) < count:
        raise ConfigError(
            f"epochs: too few, the run ends after {len(results)} steps, parity compares {count}; "
            "take more epochs or a smaller batch"
        )
    rows = strategy.gather(torch.cat([*seen, torch.empty(0, 4, dtype=torch.float64)]))
    terms, counts, norms = zip(*results, strict=True)
    parts = learner.collect() | gradients
    tensors = {f"{p}/{name}": t for p, named in parts.items() for name, t in named.items()}
    return Trace(sorted(rows.tolist()), terms, counts, norms, tensors)


def fingerprints(step: int, batch: Batch) -> Tensor:
    """Return a row per real image (K, 4) float64, in which 32-bit checksums are exact."""
    rows = []
    for i in batch.valid.nonzero().flatten().tolist():
        targets = batch.targets[i][batch.targets[i, :, 0] >= 0]
        checksums = [
            zlib.crc32(t.contiguous().numpy().tobytes()) for t in (batch.images[i], targets)
        ]
        rows.append([step, int(batch.ids[i]), *checksums])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)


def exact_convolutions() -> AbstractContextManager[None]:
    """Let GPUs convolve in fp32: else they do in TF32, ten bits short of what that promises."""
    return cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def _gradients(learner: Learner) -> StateDict:
    """Return whole gradients as the optimizer saw them: divided, in true units, clipped."""
    named = learner.model.named_parameters()
    return learner.strategy.collect({n: p.grad for n, p in named if p.grad is not None})


# -- the control --------------------------------------------------------------------


def permuted(steps: Iterable[Step], seed: int) -> Iterator[Step]:
    """Shuffle the images inside each step: equal on paper, different in rounding."""
    for step in steps:
        yield replace(step, micro_batches=_shuffle(step.micro_batches, seed, step.step))


def _shuffle(micro_batches: Sequence[Batch], *key: int) -> list[Batch]:
    sizes = [len(batch) for batch in micro_batches]
    longest = max(batch.targets.shape[1] for batch in micro_batches)
    whole = [
        replace(
            batch,
            targets=torch.nn.functional.pad(
                batch.targets, (0, 0, 0, longest - batch.targets.shape[1]), value=-1.0
            ),
        )
        for batch in micro_batches
    ]
    order = torch.from_numpy(generator("permute", *key).permutation(sum(sizes)))
    mixed = [torch.cat([getattr(b, n) for b in whole])[order].split(sizes) for n in Batch.__slots__]
    return [Batch(*values) for values in zip(*mixed, strict=True)]


# -- comparing ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gaps:
    """How far one training is from another; 0 is equal, inf is not comparable."""

    samples: float  # images that only one of them saw, or saw with other pixels or targets
    counts: float  # relative, any step: moves by 1e-3 or more when one assignment flips
    terms: float  # relative, steps 1 to 3
    norms: float  # of gradients before clipping, relative, steps 1 to 3
    first: float  # gradient of step 1, relative to each tensor's maximum
    last: float  # gradient of the last step, likewise
    weights: float  # model, absolute
    ema: float  # averaged weights, absolute
    optimizer: float  # relative to each tensor's maximum

    def as_dict(self) -> Numbers:
        """Return the gaps by name."""
        return asdict(self)


def compare(control: Trace, other: Trace) -> Gaps:
    """Measure how far `other` is from `control`."""
    ours, theirs = ({tuple(row) for row in trace.samples} for trace in (control, other))
    lengths = abs(len(control.samples) - len(other.samples))

    def gap(part: str, *, relative: bool) -> float:
        return _tensor_gap(control.part(part), other.part(part), relative=relative)

    return Gaps(
        samples=float(max(len(ours ^ theirs), lengths)),
        counts=_number_gap(control.counts, other.counts),
        terms=_number_gap(control.terms[:3], other.terms[:3]),
        norms=_number_gap(_norms(control), _norms(other)),
        first=gap("first", relative=True),
        last=gap("last", relative=True),
        weights=gap("model", relative=False),
        ema=gap("ema", relative=False),
        optimizer=gap("optimizer", relative=True),
    )


def _norms(trace: Trace) -> list[Numbers]:
    return [{"norm": norm} for norm in trace.norms[:3]]


def _number_gap(control: Sequence[Numbers], other: Sequence[Numbers]) -> float:
    """Return the largest difference, relative to the number or to a thousandth of the largest."""
    if [set(row) for row in control] != [set(row) for row in other]:
        return torch.inf
    names = [(i, name) for i, row in enumerate(control) for name in row]
    a, b = (
        torch.tensor([rows[i][name] for i, name in names], dtype=torch.float64)
        for rows in (control, other)
    )
    scale = a.abs().clamp(min=1e-3 * a.abs().max().item())
    return _largest((a - b).abs() / scale.clamp(min=torch.finfo(torch.float64).tiny))


def _tensor_gap(
    control: Mapping[str, Tensor], other: Mapping[str, Tensor], *, relative: bool
) -> float:
    """Return the largest difference, as it is or relative to each tensor's maximum."""
    if control.keys() != other.keys():
        return torch.inf
    largest = {name: t.double().abs().max().item() for name, t in control.items() if t.numel()}
    # A gradient that is zero on paper is noise: measure it against the others.
    floor = 1e-9 * max(largest.values(), default=0.0) + torch.finfo(torch.float64).tiny
    gaps = [
        _largest((control[name].double() - other[name].double()).abs())
        / (max(scale, floor) if relative else 1.0)
        for name, scale in largest.items()
    ]
    return max(gaps, default=0.0)


def _largest(values: Tensor) -> float:
    """Return the maximum; whatever is not a number is infinitely far."""
    return values.nan_to_num(nan=torch.inf).max().item() if values.numel() else 0.0
