"""Write a data set as tars: what `visiontrain data shard` does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.durable import sync_folder
from visiontrain.core.errors import ConfigError, StorageError
from visiontrain.core.seed import generator
from visiontrain.core.yaml_loader import dump_yaml
from visiontrain.data.config import ShardingConfig
from visiontrain.data.defects import counted, printable
from visiontrain.data.open import DataSpec, open_dataset
from visiontrain.data.shard_writer import MB, Written, index_name, write_split
from visiontrain.data.table import Table


@dataclass(frozen=True, slots=True)
class Sharded:
    """What was written."""

    folder: Path  # give it as `data`
    images: Mapping[str, int]  # of each split
    tars: Mapping[str, tuple[str, ...]]  # names, of each split
    size: int  # bytes, of all tars
    notes: tuple[str, ...]  # what was left out, and why

    def lines(self) -> list[str]:
        """Return the report for people."""
        lines = [
            f"{split}: {counted(self.images[split], 'image')} in {counted(len(names), 'tar')}"
            for split, names in self.tars.items()
        ]
        lines.append(f"{self.folder}: {self.size / MB:,.1f} MB; train with data={self.folder}")
        return [printable(line) for line in (*self.notes, *lines)]


def shard(config: ShardingConfig) -> Sharded:
    """Write splits of a data set as tars with an index and a data.yaml, all of it or nothing.

    Raises:
        ConfigError: the folder is used, or lies in the data set's.
        DataError: the data set, or an image of it, cannot be read.
        StorageError: the folder cannot be written.
    """
    spec = open_dataset(config.data, config.task)
    splits = list(dict.fromkeys(config.split)) or list(spec.splits)
    # Absolute, as "." has no name. Not with Path's expanduser, which raises on an unknown user.
    out = Path(os.path.abspath(os.path.expanduser(config.out)))  # noqa: PTH100, PTH111
    _refuse(out, spec)
    tables, done = {}, {}
    with _whole(out) as folder:
        for split in splits:
            table = tables[split] = spec.table(split)
            order = _order(len(table), split, shuffle=config.shuffle)
            done[split] = write_split(folder, split, table, order, config.shard_size)
        text = dump_yaml(_description(spec, tables, done))
        (folder / "data.yaml").write_text(text, encoding="utf-8")
    return Sharded(
        folder=out,
        images={split: len(table) for split, table in tables.items()},
        tars={split: tuple(written.tars) for split, written in done.items()},
        size=sum(sum(written.sizes) for written in done.values()),
        notes=tuple(spec.remarks(tables)),
    )


def _order(images: int, split: str, *, shuffle: bool) -> NDArray[np.int64]:
    """Return the order to write in; mixed, as windows of a few tars must be like the whole set."""
    return generator("shards", split).permutation(images) if shuffle else np.arange(images)


def _refuse(out: Path, spec: DataSpec) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out: {out} is a file; name a folder")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: {out} is not empty; name another folder")
    if spec.format != "digits" and out.resolve().is_relative_to(spec.root.resolve()):
        raise ConfigError(
            f"out: {out} lies in the data set's folder {spec.root}, where nothing is written; "
            "name another folder"
        )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Make a folder that gets its name when the block ends well, and is removed if not."""
    try:
        folder = out.with_name(f".{out.name}.{os.getpid()}.part")
        folder.mkdir(parents=True)
        try:
            yield folder
            sync_folder(folder)
            folder.replace(out)  # in place of an empty one, too
            sync_folder(out.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"{out}: cannot be written ({reason}); make room, or name another folder"
        ) from error


def _description(
    spec: DataSpec, tables: Mapping[str, Table], done: Mapping[str, Written]
) -> dict[str, Any]:
    """Return the data.yaml, with what the data set recommends."""
    values: dict[str, Any] = {"format": "shards", "names": list(next(iter(tables.values())).names)}
    for split, written in done.items():
        last = written.tars[-1].removeprefix(f"{split}-").removesuffix(".tar")
        values[split] = f"{split}-{{{'0' * len(last)}..{last}}}.tar"
    values["index"] = {split: index_name(split) for split in done}
    if spec.defaults:
        key = "defaults" if spec.task == "detect" else "defaults_classify"
        values[key] = dict(spec.defaults)
    return values
