"""open_dataset: from what the user typed after `data=` to tables."""

from __future__ import annotations

import difflib
import errno
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from visiontrain.core.config import datasets_folder
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.own import Data, Own, refuse_missing
from visiontrain.core.shipped import shipped
from visiontrain.core.yaml_loader import load_yaml
from visiontrain.data import coco, folder, voc
from visiontrain.data.atomic import cache_folder
from visiontrain.data.cache import keep_images
from visiontrain.data.config import DataConfig
from visiontrain.data.defects import counted, describe, fatal, printable, summary
from visiontrain.data.description import IGNORED, Choice, Description, Reader, some
from visiontrain.data.images import FileImages
from visiontrain.data.own import OwnReader
from visiontrain.data.registry import FORMATS
from visiontrain.data.scan import decode_all
from visiontrain.data.shard_images import ShardImages
from visiontrain.data.shards import ShardReader
from visiontrain.data.table import Table
from visiontrain.data.tiles import tiled

OUT_OF_REACH = {  # paths that cannot even be looked at; other errors are not the data's
    *(errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ESTALE),
    *(errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
}
STORED = re.compile("[0-9a-f]{30}")  # a digest: DVC's, git-annex's, Hugging Face's
SPLIT_KEYS = ("train", "val", "validation", "test")
MOVE = "move its classes into train/, and "
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml")  # looked for in a folder


@dataclass(frozen=True, slots=True)
class DataSpec:
    """A data set that was found; labels are read by `table`."""

    source: str  # as the user typed it
    names: tuple[str, ...]
    format: str
    task: str  # what the labels are for
    root: Path
    splits: Mapping[str, Any]
    defaults: Mapping[str, Any]  # keys of Run that the data set recommends, nested
    notes: tuple[str, ...]  # what a user should know, for the console
    config: DataConfig
    reader: Reader

    def read(self, split: str) -> Table:
        """Return everything `split` holds, with all its defects, whatever they are.

        Raises:
            DataError: The split is missing or has no image.
        """
        if split not in self.splits:
            there = ", ".join(self.splits) or "none"
            raise DataError(
                f"{self.source}: no split {split!r}, it has {there}; {self.how_to_add(split)}"
            )
        with _reached(self.config):
            table = self.reader.read(split, self._choice(split))
        if self.config.single_cls:
            one = np.zeros_like(table.classes)
            table = replace(table, names=self.names, classes=one, category_ids=None)
        return table

    def table(self, split: str) -> Table:
        """Return what to train on or score: `data.*` applied, images cached if asked for.

        Raises:
            DataError: The split is missing, no image or box of it can be used, a class is out
                of range, or anything is wrong under `data.strict`.
        """
        table = self.read(split)
        worst = fatal(table.defects, strict=self.config.strict)
        if worst is not None:
            more = f" ({counted(len(table.defects), 'defect')}: {summary(table.defects)})"
            raise DataError(f"{describe(worst)}{more}; {self._advice}")
        self._refuse_empty(split, table)
        if self.config.strict and isinstance(table.images, FileImages | ShardImages):
            decode_all(table.images)
        return keep_images(table, self.config.cache, cache_folder(self.config.cache_dir))

    def cut(self, table: Table) -> Table:
        """Return what to train on of a table: its images, or tiles of them."""
        tiling = self.config.tiling
        return table if tiling is None else tiled(table, tiling).table

    def remarks(self, tables: Mapping[str, Table]) -> list[str]:
        """Return what a user should know before training on the tables of these splits."""
        lines = list(self.notes)
        for split, table in tables.items():
            if table.defects:
                found = f"{self.source}: {split}: {summary(table.defects)}"
                if self.config.own is not None:  # there is no check of it
                    found += f"; first: {describe(table.defects[0])}"
                lines.append(f"{found}; {self._advice}")
            if split == "train":
                counts = np.bincount(table.classes, minlength=len(table.names))
                missing = [table.names[label] for label in np.flatnonzero(counts == 0)]
                if missing:
                    what = "image" if table.task == "classify" else "box"
                    lines.append(f"{self.source}: train: no {what} of {some(missing)}")
        return [printable(line) for line in lines]

    def how_to_add(self, split: str) -> str:
        """Return what would give the data set a split that it lacks."""
        if self.config.own is not None:
            return f"give Data({split}=...)"
        if not str(self.source).endswith((".yaml", ".yml")) and self.source not in shipped_sets():
            if self.format == "folder" and not (self.root / "data.yaml").is_file():
                flat = self.splits.get("train") == "."
                return f"{MOVE if flat else ''}add a folder {split}/CLASS to it"
            if self.source.endswith(".json"):
                return f"name it as `{split}:` in a YAML with `format: coco`"
        listed = f"ImageSets/Main/{split}.txt, or " if self.format == "voc" else ""
        return f"add {listed}`{split}:` to the data set's YAML"

    @property
    def _advice(self) -> str:
        if self.config.own is not None:
            return "mend them in the data set"
        return f"`visiontrain check data={shlex.quote(self.source)} --json` lists them all"

    def _choice(self, split: str) -> Choice:
        if split == "train":
            return Choice(self.config.train_images, self.config.fraction)
        return Choice(self.config.val_images)

    def _refuse_empty(self, split: str, table: Table) -> None:
        found = ""
        if table.defects:
            found = f": {summary(table.defects)}; first: {describe(table.defects[0])}"
        if not len(table):
            raise DataError(f"{self.source}: {split}: no usable image{found}")
        what = "label" if table.task == "classify" else "box"
        if not len(table.boxes):
            raise DataError(
                f"{self.source}: {split}: no {what} in {counted(len(table), 'image')}{found}; "
                "check where the labels lie (datasets/README.md)"
            )
        if split == "train" and table.num_ignored == len(table.boxes):
            raise DataError(
                f"{self.source}: {split}: no box to train on in {counted(len(table), 'image')}: "
                f"{counted(len(table.boxes), 'box')}, all crowd or difficult{found}; "
                "label single objects"
            )


def open_dataset(config: DataConfig, task: str | None = None) -> DataSpec:
    """Find a data set: a name from datasets/, a YAML, a COCO JSON, or a folder.

    Args:
        config: The section `data`.
        task: What is to be learned from it; default: what its labels are for.

    Raises:
        ConfigError: The description cannot be used, or not for `task`.
        DataError: There is none, or what it names is missing.
    """
    if config.own is not None:
        return _own(config, config.own, task)
    with _reached(config):
        return _opened(config, task)


@contextmanager
def _reached(config: DataConfig) -> Iterator[None]:
    """Turn a path that cannot even be looked at, such as another user's, into one clear line."""
    try:
        yield
    except OSError as error:
        if config.own is not None or error.errno not in OUT_OF_REACH:
            raise
        reason = error.strerror or str(error)
        raise DataError(
            f"data: {error.filename or config.source}: {reason}; give what can be read here"
        ) from error


def _opened(config: DataConfig, task: str | None) -> DataSpec:
    environment = datasets_folder()
    place = _find(config.source, environment)
    description = replace(_describe(place, config, environment), task=task)
    kind = description.values.get("format", "yolo")
    if kind not in FORMATS:
        raise description.fail("format", f"got {kind!r}", f"one of {', '.join(FORMATS)}")
    _refuse_idle_keys(config, kind, description)
    reader = FORMATS[kind](description)
    if isinstance(reader, ShardReader) and not reader.remote:
        _refuse_idle(config, "shard_cache_gb", f"no tar of {description.where} lies at a URL")
    _check_task(task, reader, f"{description.where} ({kind})")
    key = "defaults" if reader.task == "detect" else "defaults_classify"
    defaults = description.values.get(key, {})
    if not isinstance(defaults, dict):
        raise description.fail(key, f"got {defaults!r}", "give keys of the run")
    return DataSpec(
        source=config.source,
        names=("object",) if config.single_cls else reader.names,
        format=kind,
        task=reader.task,
        root=reader.root,
        splits=MappingProxyType(dict(reader.splits)),
        defaults=MappingProxyType(defaults),
        notes=(*_notes(description), *reader.notes),
        config=config,
        reader=reader,
    )


def _own(config: DataConfig, own: Own, task: str | None) -> DataSpec:
    """Open data sets that were passed in Python."""
    refuse_missing(config, 'visiontrain.train("config.yaml", {})', "data.")
    if not isinstance(own.value, Data):
        raise ConfigError(
            f"data: {own.ref}; pass visiontrain.Data(train=..., val=..., names=[...])"
        )
    for key in ("window", "shard_cache_gb", "max_pixels", "cache_dir"):
        _refuse_idle(config, key, f"{own.ref} is a data set in Python")
    if config.cache == "disk":
        raise ConfigError(f"data.cache: disk, but {own.ref} is a data set in Python; take ram")
    reader = OwnReader(own.value, own.ref, single_cls=config.single_cls)
    _check_task(task, reader, own.ref)
    return DataSpec(
        source=own.ref,
        names=("object",) if config.single_cls else reader.names,
        format="Python",
        task=reader.task,
        root=reader.root,
        splits=MappingProxyType(dict(reader.splits)),
        defaults=MappingProxyType({}),
        notes=(),
        config=config,
        reader=reader,
    )


def _check_task(task: str | None, reader: Reader, where: str) -> None:
    if task not in (None, reader.task):
        holds = "boxes" if reader.task == "detect" else "labels of whole images"
        raise ConfigError(
            f"task: {task}, but {where} holds {holds}; take task={reader.task} or other data"
        )


def _refuse_idle_keys(config: DataConfig, kind: str, description: Description) -> None:
    """Refuse what only says something of shards where there are none."""
    for key in ("window", "shard_cache_gb") if kind != "shards" else ():
        _refuse_idle(config, key, f"{description.where} is {kind}, not shards")
    if kind == "digits" and config.cache == "disk":
        raise ConfigError(f"data.cache: disk, but {description.where} has no files; take ram")


def _refuse_idle(config: DataConfig, key: str, reason: str) -> None:
    value = getattr(config, key)
    if value != DataConfig.model_fields[key].default:
        raise ConfigError(f"data.{key}: {value}, but {reason}; leave it out")


def shipped_sets() -> dict[str, Path]:
    """Return the YAMLs in datasets/ by the names that `data=` takes."""
    return {path.stem: path for path in sorted(shipped("datasets").glob("*.yaml"))}


def composed_sets() -> list[str]:
    """Name the data sets that ship whole: their scenes are composed, no file need be there."""
    return [name for name, path in shipped_sets().items() if _load(path).get("format") == "digits"]


def _find(source: str, environment: Path | None) -> Path:
    """Return the file or folder that `source` means; a name from datasets/ wins over a folder."""
    known = shipped_sets()
    if source in known:
        return known[source]
    places = [Path(os.path.expanduser(source)), Path("datasets") / source]  # noqa: PTH111 - Path's raises
    if environment is not None:
        places.insert(1, environment / source)
    for place in places:
        if place.exists():
            return place
    close = difflib.get_close_matches(source, known, n=1)
    advice = f"did you mean {close[0]!r}? " if close else ""
    tried = ", ".join(dict.fromkeys(map(str, places)))
    raise DataError(f"data: nothing at {tried}; {advice}known names: {', '.join(known)}")


def _root(place: Path) -> Mapping[str, Any] | None:
    """Return what a folder's own layout amounts to; None where a file in it describes it."""
    path = str(place.resolve())
    described = any((place / name).is_file() for name in YAML_NAMES)
    if voc.is_root(place) and not described:
        return {"format": "voc", "path": path}
    splits = folder.splits_of(place) if _file_in(place) is None else None
    return None if splits is None else {"format": "folder", "path": path, **splits}


def _describe(place: Path, config: DataConfig, environment: Path | None) -> Description:
    """Turn what was found into a description."""
    values: Mapping[str, Any]
    here = place.resolve()
    if STORED.search(here.name):  # what a store of large files links to has nothing beside it
        here = Path(os.path.abspath(place))  # noqa: PTH100
    if place.is_dir():
        found = _root(place)
        if found is None:
            return _describe(_describing(place), config, environment)
        values = found
    elif place.suffix.lower() == ".json":
        values = {"format": "coco", "path": str(here.parent)} | coco.split_files(here)
    else:
        values = _load(place)
    ours = config.source in shipped_sets()
    return Description(
        where=f"data={config.source}" if ours else str(place),
        values=values,
        folder=here.parent,
        datasets=environment,
        cache=cache_folder(config.cache_dir),
        max_pixels=config.max_pixels,
        single_cls=config.single_cls,
        shipped=ours,
        window=config.window,
        shard_cache_gb=config.shard_cache_gb,
    )


def _file_in(place: Path) -> Path | None:
    """Return the file that describes what a folder holds: a YAML, or the COCO JSON to train on."""
    for name in YAML_NAMES:
        if (place / name).is_file():
            return place / name
    return coco.find_file(place)


def _describing(place: Path) -> Path:
    found = _file_in(place)
    if found is not None:
        return found
    wanted = (
        f"{', '.join(YAML_NAMES)}, COCO's annotations/*.json, VOC's {', '.join(voc.FOLDERS)}, "
        "or a folder of pictures for each class"
    )
    raise DataError(f"data: {place} holds no data set; looked for {wanted}")


def _load(place: Path) -> Mapping[str, Any]:
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: cannot be read ({error}); give a YAML or a COCO JSON") from error
    values = load_yaml(text, str(place))
    if not isinstance(values, dict):
        raise DataError(f"{place}: no keys in it; see datasets/README.md for what belongs there")
    # CVAT writes Train and Validation.
    ours = {k.lower() if str(k).lower() in SPLIT_KEYS else k: v for k, v in values.items()}
    if len(ours) < len(values):
        raise ConfigError(f"{place}: a split twice, in other capitals; leave one of them out")
    return ours


def _notes(description: Description) -> list[str]:
    """Say what is left out, and what a score may hide."""
    ignored = [key for key in description.values if key in IGNORED and key != "url"]
    notes = []
    if "download" in ignored:
        notes.append(f"{description.where}: `download` is ignored: nothing is downloaded")
        ignored.remove("download")
    if ignored:
        notes.append(f"{description.where}: ignored: {', '.join(ignored)}")
    values = description.values
    train, val = values.get("train"), values.get("val", values.get("validation"))
    if isinstance(train, str) and train == val:
        notes.append(f"{description.where}: train and val are the same images; scores flatter")
    return notes
