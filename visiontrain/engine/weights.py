"""Weights files: tensors in safetensors, and in the header what is needed to use them."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode_tensors
from torch import Tensor

from visiontrain.core.durable import replace_file, require_space, storing, to_json
from visiontrain.core.errors import CheckpointError
from visiontrain.core.explain import short
from visiontrain.core.interfaces import StateDict
from visiontrain.core.types import ClassRows
from visiontrain.engine.run_folder import RunFolder
from visiontrain.tasks.registry import TASKS

SCHEMA = 1
KEY = "visiontrain"  # the header's metadata: this key holds one JSON object
RGB = {"order": "RGB", "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}  # of pixels in [0, 1]


@dataclass(frozen=True, slots=True)
class WeightsMeta:
    """What a weights file says of itself; described in weights/README.md."""

    task: str
    model: Mapping[str, Any]  # the model section of the config
    names: Sequence[str]  # class names in the order of the output's rows
    imgsz: int  # pixels
    task_config: Mapping[str, Any] = field(default_factory=dict)
    norm: Mapping[str, Any] = field(default_factory=lambda: dict(RGB))
    tile: Sequence[int] | None = None  # side and overlap of the tiles it was trained on, pixels
    license: str = ""  # of the weights, as far as its maker states one
    metrics: Mapping[str, Any] = field(default_factory=dict)  # on the validation split
    epoch: int = 0
    step: int = 0
    config_sha256: str = ""  # of the run's config.yaml
    version: str = ""  # of visiontrain
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class Weights:
    """A weights file in memory."""

    meta: WeightsMeta
    tensors: StateDict  # on the CPU


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors, the same in every mode and precision that holds them.

    Floats count as fp32, in which models are made: fp64 holds the same values.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).contiguous()
        found.update(f"{name} {list(value.shape)} {value.dtype}\n".encode())
        found.update(value.numpy().tobytes())
    return found.hexdigest()


def save_weights(path: Path, meta: WeightsMeta, tensors: StateDict) -> None:
    """Write `path` and, beside it, its metadata as JSON; each whole or not at all.

    Raises:
        StorageError: when they cannot be written; an older file stays.
    """
    described = to_json(asdict(meta))
    data = encode_tensors(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {KEY: described.decode()},  # one key: safetensors writes several in any order
    )
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        require_space(path.parent, len(data))
        replace_file(path, data)
        replace_file(path.with_suffix(".json"), described)


def load_weights(path: str | Path) -> Weights:
    """Read a weights file, or the best weights of a run folder.

    Raises:
        CheckpointError: when there is none, or it is not one of ours.
    """
    return _read(path, tensors=True)


def load_meta(path: str | Path) -> WeightsMeta:
    """Read what a weights file, or the best of a run folder, says of itself; raise as above."""
    return _read(path, tensors=False).meta


def _read(path: str | Path, *, tensors: bool) -> Weights:
    file = Path(os.path.expanduser(path))  # noqa: PTH111 - Path's raises, as those below do
    if os.path.isdir(file):  # noqa: PTH112
        file = _best_of(RunFolder(file))
    if not os.path.isfile(file):  # noqa: PTH113
        raise CheckpointError(
            f"weights: {path} not found; give a .safetensors file or the folder of a run"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            header = (opened.metadata() or {}).get(KEY)
            names = opened.keys() if tensors else ()
            found = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"weights: {file} is no intact safetensors file ({error}); give one that "
            "visiontrain wrote: those of other tools cannot be read"
        ) from error
    return Weights(read_meta(header, file), found)


def _best_of(run: RunFolder) -> Path:
    """Return the best weights that a run left.

    Raises:
        CheckpointError: it left none, or none yet, or never scored them.
    """
    if run.best.is_file():
        return run.best
    if run.last.is_file():
        got, advice = "no best weights: its run has scored none yet", f"give {run.last}"
    elif run.config.is_file() and not run.metrics.is_file():
        command = f"visiontrain train out={shlex.quote(str(run.path))} resume=true"
        got, advice = "no weights yet", f"wait for its run, or go on with it: `{command}`"
    else:
        got, advice = "no weights", "give a .safetensors file or the folder of a training run"
    raise CheckpointError(f"weights: {run.path} holds {got}; {advice}")


def read_meta(header: str | None, file: Path) -> WeightsMeta:
    """Decode the header's metadata.

    Raises:
        CheckpointError: when it is missing, of another schema, or means what is unknown here.
    """
    try:
        values = json.loads(header or "")
        if values["schema"] != SCHEMA:
            got = f"schema {values['schema']}, this version reads {SCHEMA}"
        else:
            meta = WeightsMeta(**values)
            got = _unusable(meta)
            if got is None:
                return meta
    except (ValueError, KeyError, TypeError):
        got = f"a header without visiontrain's `{KEY}` metadata"
    raise CheckpointError(f"weights: {file} has {got}; give a file that visiontrain wrote")


def _unusable(meta: WeightsMeta) -> str | None:
    """Return what of a file's metadata would be misread here; None where all is well."""
    names = meta.names
    good = {
        "task": meta.task in TASKS,
        "model": isinstance(meta.model, dict),
        "names": isinstance(names, list) and names and all(isinstance(name, str) for name in names),
        "imgsz": isinstance(meta.imgsz, int) and meta.imgsz > 0 and meta.imgsz % 32 == 0,
        "task_config": isinstance(meta.task_config, dict),
        "norm": meta.norm == RGB,
        "tile": _is_tile(meta.tile),
    }
    bad = [f"{key} {short(repr(getattr(meta, key)))}" for key, fine in good.items() if not fine]
    return f"{bad[0]}, which this version can't use" if bad else None


SMALLEST = 32  # side of a tile, pixels


def _is_tile(value: Any) -> bool:
    match value:
        case None:
            return True
        case [int(side), int(overlap)]:
            return 0 <= overlap < side and side >= SMALLEST
    return False


@dataclass(frozen=True, slots=True)
class Start:
    """What a model took from a weights file."""

    tensors: StateDict  # whole tensors to load, one for each of the model's
    line: str  # for people


def start_from(
    weights: Weights,
    own: Mapping[str, Tensor],
    names: Sequence[str],
    class_rows: Mapping[str, ClassRows],
) -> Start:
    """Take from `weights` what fits a model: equal shapes, and class rows by class name.

    Args:
        weights: where to take from.
        own: the model's freshly made tensors, kept where nothing fits.
        names: the model's classes.
        class_rows: which tensors have rows for each class, and how those lie.

    Raises:
        CheckpointError: when not one tensor fits.
    """
    old = list(weights.meta.names)
    shared = [name for name in names if name in old]
    result, left, mapped = dict(own), list[str](), False
    for key, mine in own.items():
        theirs = weights.tensors.get(key)
        if theirs is not None and key in class_rows and old != list(names):
            rows = class_rows[key]
            ok = theirs.shape[1:] == mine.shape[1:] and len(theirs) == rows.count(len(old))
            found = {i: old.index(name) for i, name in enumerate(names) if name in old}
            theirs = _map_rows(theirs, mine, found, rows) if ok and shared else None
            mapped |= theirs is not None and mine.ndim > 1
        if theirs is None or theirs.shape != mine.shape:
            left.append(key)
        else:
            result[key] = theirs.to(mine.dtype)
    if not any(own[key].ndim for key in own.keys() - set(left)):  # of single numbers all are alike
        kind = weights.meta.model.get("kind")
        advice = "a model of Python, pass it as model=" if kind == "object" else f"model={kind}"
        raise CheckpointError(
            f"weights: not one of {len(weights.tensors)} tensors fits this model; the file holds "
            f"{advice}"
        )
    said = f"class rows by name for {len(shared)} of {len(names)} classes"
    # Their width follows the number of classes.
    if shared and not mapped and class_rows.keys() & weights.tensors.keys():
        said = "class branches of another width, made anew"
    return Start(result, _describe(weights, own, left, "" if old == list(names) else said))


def _map_rows(theirs: Tensor, mine: Tensor, found: Mapping[int, int], rows: ClassRows) -> Tensor:
    """Copy the rows of classes that both know, `found` from ours to theirs; others stay as made."""
    result, source = rows.split(mine.detach().cpu().clone()), rows.split(theirs)
    result[:, : rows.others] = source[:, : rows.others].to(result.dtype)
    for ours, other in found.items():
        result[:, rows.others + ours] = source[:, rows.others + other].to(result.dtype)
    return result.reshape(mine.shape)


def _describe(
    weights: Weights,
    own: Mapping[str, Tensor],
    left: Sequence[str],
    classes: str,
) -> str:
    parts = [f"weights: took {len(own) - len(left)} of {len(own)} tensors"]
    if classes:
        parts.append(classes)
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if len(left) > 4 else "")
        parts.append(f"not taken: {shown}")
    extra = sorted(weights.tensors.keys() - own.keys())
    if extra:
        parts.append(f"not used: {len(extra)} of the file's, such as {extra[0]}")
    return "; ".join(parts)


def floats_of(tensors: StateDict) -> StateDict:
    """Bring fp64 tensors to fp32: what is shared and used is single precision."""
    return {k: t.float() if t.dtype == torch.float64 else t for k, t in tensors.items()}
