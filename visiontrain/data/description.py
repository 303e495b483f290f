"""Description: what a data set says of itself, in YAML or by its layout, and where it looks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.seed import generator
from visiontrain.data.defects import counted
from visiontrain.data.table import Table

# Keys of other tools that say nothing about which images and labels to read.
IGNORED = frozenset(
    {
        *("author", "channels", "date", "description", "download", "flip_idx", "info"),
        *("licence", "license", "links", "minival", "roboflow", "task", "url", "version"),
    }
)
SPLITS = ("train", "val", "test")
LISTED = 5  # names that a note gives


@dataclass(frozen=True, slots=True)
class Choice:
    """Which images of a split to use."""

    images: int | None = None  # at most
    fraction: float = 1.0

    def count(self, total: int) -> int:
        """Return how many of `total` images are used; at least one."""
        share = max(1, round(total * self.fraction))
        return min(share, total, self.images or total)

    def rows(self, total: int) -> NDArray[np.int64]:
        """Return which of `total` images are used, in order: always the same random ones.

        Fewer are a subset of more, and the first ones would often be all of one kind.
        """
        order = generator("data", "choice").permutation(total)
        return np.sort(order[: self.count(total)]).astype(np.int64)


class Reader(Protocol):
    """A data set, opened: what every format in `data.registry.FORMATS` offers."""

    names: tuple[str, ...]
    task: str  # what the labels are for: detect or classify
    several: bool  # an image may have any number of classes
    root: Path
    splits: Mapping[str, Any]  # those it has; the values are the format's own
    notes: tuple[str, ...]  # what a user should know

    def read(self, split: str, choice: Choice) -> Table:
        """Read the labels of `split`; everything wrong is among the table's defects."""
        ...


@dataclass(frozen=True, slots=True)
class Description:
    """The keys of a data set's YAML (or what its layout amounts to), and its surroundings."""

    where: str  # what messages call it
    values: Mapping[str, Any]
    folder: Path  # the YAML's
    datasets: Path | None  # $VISIONTRAIN_DATASETS
    cache: Path  # where scans of many images are kept
    max_pixels: int
    single_cls: bool  # boxes of all classes are alike
    shipped: bool = False  # the YAML is the package's: no data lie beside it
    task: str | None = None  # what the run is to learn, if it says so
    window: int = 16  # shards that are read at a time
    shard_cache_gb: float = 20.0  # of copies of shards at URLs

    def fail(self, key: str, got: str, advice: str) -> ConfigError:
        """Return the error for `key`, to be raised."""
        return ConfigError(f"{self.where}: {key}: {got}; {advice}")

    def check_keys(self, known: Iterable[str]) -> None:
        """Refuse keys that mean nothing to the format."""
        known = {"format", "defaults", "defaults_classify", *known}
        for key in self.values:
            if key not in known | IGNORED:
                raise self.fail(str(key), "an unknown key", f"known: {', '.join(sorted(known))}")

    def places(self, relative: str) -> Iterator[Path]:
        """Yield where a relative path may lie, in the order of trust."""
        own = None if self.shipped else self.folder
        for folder in (own, self.datasets, Path("datasets")):
            if folder is not None:
                yield folder / relative

    def locate(self, key: str, relative: str) -> Path:
        """Return the first of `places` that exists; `path` is tried here, too, as Ultralytics does.

        Raises:
            DataError: None does.
        """
        tried = list(dict.fromkeys(self.places(relative)))
        here = Path(relative)
        # Of `path` alone: an `images/val` that lies here may be another data set's.
        if key == "path" and here.absolute() not in tried:
            tried.append(here)
        for place in tried:
            if place.exists():
                return place.resolve()
        listed = ", ".join(map(str, tried))
        url = self.values.get("url")
        source = f"get it from {' '.join(url.split())}, " if isinstance(url, str) else ""
        advice = "put it in ./datasets, or point $VISIONTRAIN_DATASETS at the folder that holds it"
        if here.is_absolute():  # as of the machine that the YAML comes from
            advice = f"correct `{key}:`"
            advice += ", or leave it out where the data lie beside the YAML" * (key == "path")
        raise DataError(f"{self.where}: {key}: nothing at {listed}; {source}{advice}")

    def root(self) -> Path:
        """Return the folder that the splits are relative to (key `path`)."""
        path = self.values.get("path")
        if path is None:
            return self.folder.resolve()
        if not isinstance(path, str):
            raise self.fail("path", f"got {path!r}", "give one folder")
        root = self.locate("path", path)
        if not root.is_dir():
            raise self.fail("path", f"{root} is a file", "give a folder")
        return root

    def sources(self) -> dict[str, list[str]]:
        """Return what each split names: one text or a list of texts in the YAML."""
        values = dict(self.values)
        if "validation" in values:
            values.setdefault("val", values["validation"])
        found = {split: values[split] for split in SPLITS if values.get(split)}
        if not found:
            raise self.fail("train", "no split is given", "add train: and val:")
        return {split: self._texts(split, value) for split, value in found.items()}

    def _texts(self, split: str, value: Any) -> list[str]:
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, str) for entry in entries):
            raise self.fail(split, f"got {value!r}", "give a path or a list of paths")
        return entries

    def names(self) -> tuple[str, ...] | None:
        """Return the class names (keys `names`, `nc`); None when the YAML has neither."""
        names, count = self.values.get("names"), self.values.get("nc")
        if isinstance(count, str) and count.isdecimal():
            count = int(count)
        if count is not None and (not isinstance(count, int) or count < 1):
            raise self.fail("nc", f"got {count!r}", "give the number of classes")
        if names is None:
            return None if count is None else tuple(f"class{i}" for i in range(count))
        listed = self._listed(names)
        if count is not None and count != len(listed):
            raise self.fail("nc", f"{count}, but {counted(len(listed), 'name')}", "make them agree")
        return unique_names(listed, self.where)

    def _listed(self, names: Any) -> list[str]:
        if isinstance(names, dict):
            try:
                numbered = {int(key): name for key, name in names.items()}
            except (TypeError, ValueError) as error:
                raise self.fail("names", f"got keys {list(names)}", "number them from 0") from error
            if sorted(numbered) != list(range(len(names))):
                raise self.fail("names", f"numbered {sorted(numbered)}", "number them 0, 1, 2 ...")
            names = [numbered[i] for i in range(len(numbered))]
        if not isinstance(names, list) or not names:
            raise self.fail("names", f"got {names!r}", "give a list of class names")
        if any(isinstance(name, bool) for name in names):
            raise self.fail("names", f"got {names!r}", "put true, false, yes and no into quotes")
        if not all(isinstance(name, str | int | float) for name in names):
            raise self.fail("names", f"got {names!r}", "give texts")
        return [str(name).strip() for name in names]


def lines_of(path: Path) -> list[str]:
    """Read a list.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); save the list as UTF-8") from error


def some(names: Sequence[str]) -> str:
    """List the first few."""
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


def unique_names(names: list[str], where: str) -> tuple[str, ...]:
    """Refuse two classes of one name, and a name without text."""
    seen: dict[str, int] = {}
    for index, name in enumerate(names):
        if not name:
            raise ConfigError(f"{where}: names: class {index} has no name; name it")
        if name in seen:
            got = f"classes {seen[name]} and {index} are both {name!r}"
            raise ConfigError(f"{where}: names: {got}; rename one, or merge them in the labels")
        seen[name] = index
    return tuple(names)
