"""Config: sections that are frozen and typed, and how files and `key=value` become them."""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from visiontrain.core.errors import ConfigError
from visiontrain.core.keys import ALIASES, MAIN_FIELD, STRATEGY_ALIASES
from visiontrain.core.yaml_loader import load_yaml

Tree = dict[str, Any]
MAX_EXTENDS = 8


class Section(BaseModel):
    """A part of the config. Values are checked when made and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


S = TypeVar("S", bound=Section)


def datasets_folder() -> Path | None:
    """Return $VISIONTRAIN_DATASETS, where relative data set paths are also looked for."""
    text = os.environ.get("VISIONTRAIN_DATASETS")
    return Path(text).expanduser() if text else None


def wandb_key_set() -> bool:
    """Say whether $WANDB_API_KEY is set: only then does wandb send anything."""
    return bool(os.environ.get("WANDB_API_KEY"))


def load(root: type[S], arguments: Sequence[str], presets: Path) -> S:
    """Make a `root` from the words of a command line.

    Args:
        root: the config's class.
        arguments: PRESET names or files, then `key=value`, `--key=value` or `--key value`.
        presets: folder in which preset names are looked up.

    Raises:
        ConfigError: one line: where, what it got, what would do.
    """
    tree: Tree = {}
    for word in _joined(arguments):
        key, equals, text = word.partition("=")
        if equals:
            assign(root, tree, key.strip(), _scalar(root, key.strip(), text.strip()))
        else:
            tree = merge(tree, read_preset(root, word, presets))
    return build(root, tree)


def from_keys(root: type[S], keys: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> S:
    """Make a `root` from Python values by the same names, aliases and rules.

    Args:
        root: the config's class.
        keys: names, dotted names or aliases, and their values.
        base: what a preset says (`read_preset`); `keys` go on top.

    Raises:
        ConfigError: as `load`.
    """
    tree: Tree = dict(base or {})
    for key, value in keys.items():
        assign(root, tree, key, _plain(value))
    return build(root, tree)


def build(root: type[S], tree: Mapping[str, Any]) -> S:
    """Check a tree of plain values.

    Raises:
        ConfigError: as `load`, of the first thing that is wrong.
    """
    tree = _with_kinds(root, tree)
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(root, tree, error)) from None


def _with_kinds(root: type[Section], tree: Mapping[str, Any]) -> Tree:
    """Name the default kind of sections that leave it open."""
    out = dict(tree)
    for name, value in tree.items():
        field = root.model_fields.get(name)
        if field and len(_sections(field.annotation)) > 1 and isinstance(value, Mapping):
            out[name] = {**_kind(field.default), **value}
    return out


# -- reading ------------------------------------------------------------------------


def _joined(arguments: Sequence[str]) -> Iterator[str]:
    """Turn `--key value`, `--key=value` and `key = value` into `key=value`."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if words and words[0] == "=":
            word, words = word + "".join(words[:2]), words[2:]
        elif word.startswith("--") and "=" not in word:
            if not words:
                raise ConfigError(f"{word}: no value; write {word[2:]}=VALUE")
            word = f"{word}={words.pop(0)}"
        yield word.removeprefix("--")


def read_preset(root: type[Section], name: str, presets: Path, depth: int = 0) -> Tree:
    """Read a config file, or a preset by name, and what it `extends`.

    Raises:
        ConfigError: when there is none, or it is not a mapping of known keys.
    """
    path = Path(name)
    if not path.is_file():
        found = [presets / name, presets / f"{name}.yaml", *presets.glob(f"*/{name}.yaml")]
        path = next((p for p in found if p.is_file()), path)
    if not path.is_file() or depth > MAX_EXTENDS:
        known = sorted(
            str(p.relative_to(presets).with_suffix("")) for p in presets.glob("*/*.yaml")
        )
        close = difflib.get_close_matches(name, [*known, *all_keys(root)], n=1)
        hint = f"did you mean {close[0]}?" if close else f"presets: {', '.join(known)}"
        raise ConfigError(f"{name}: no such file or preset, and no key=value; {hint}")
    content = load_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a {type(content).__name__}; write key: value lines")
    base = content.pop("extends", None)
    tree = read_preset(root, _beside(path, base), presets, depth + 1) if base else {}
    for key, value in content.items():
        assign(root, tree, str(key), value)
    return tree


def _beside(path: Path, base: Any) -> str:
    near = path.parent / str(base)
    return str(near) if near.is_file() else str(base)


def _scalar(root: type[Section], key: str, text: str) -> Any:
    """Read a value from the command line; where only text fits, it stays text."""
    annotation = annotation_of(root, ALIASES[key][0] if key in _aliases(root) else key)
    value = load_yaml(text, key)
    wants_text = annotation is not None and str in _options(annotation)
    return text if wants_text and value is not None else value


def _plain(value: Any) -> Any:
    """Turn Python values that stand for text into text; sections into mappings."""
    if isinstance(value, Section):
        return value.model_dump(exclude_unset=True) | _kind(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _kind(section: Section) -> Tree:
    return {"kind": section.kind} if "kind" in type(section).model_fields else {}  # type: ignore[attr-defined]


# -- keys ---------------------------------------------------------------------------


def assign(root: type[Section], tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key or alias in `tree`; a scalar given to a section sets its main field.

    Raises:
        ConfigError: when there is no such key.
    """
    if key in _aliases(root):
        key, turn = ALIASES[key]
        value = turn(value)
    if annotation_of(root, key) is None:
        raise ConfigError(f"{key}: no such key; {hint(root, key)}")
    *parents, last = key.split(".")
    for parent in parents:
        child = tree.get(parent)
        tree[parent] = child if isinstance(child, dict) else {}
        tree = tree[parent]
    section = bool(_sections(annotation_of(root, key)))
    if section and isinstance(value, Mapping):
        old = tree.get(last, {})
        tree[last] = merge({last: old}, {last: dict(value)})[last]
    elif section:
        field = MAIN_FIELD.get(last, "kind")
        value = STRATEGY_ALIASES.get(value, value) if last == "strategy" else value
        tree[last] = {**tree.get(last, {}), field: value}
    else:
        tree[last] = value


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> Tree:
    """Put `new` over `old`; a section of another kind replaces the old one whole."""
    out = dict(old)
    for key, value in new.items():
        before = out.get(key)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        alike = both and value.get("kind", before.get("kind")) == before.get(
            "kind", value.get("kind")
        )
        out[key] = merge(before, value) if alike else value
    return out


def _options(annotation: Any) -> list[Any]:
    """List what an annotation allows, unions and Annotated taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in _options(part)]
    return [annotation]


def _sections(annotation: Any) -> list[type[Section]]:
    options = _options(annotation)
    return [o for o in options if isinstance(o, type) and issubclass(o, Section)]


def annotation_of(root: type[Section], key: str) -> Any:
    """Return the type of a dotted key, None when there is no such key."""
    first, _, rest = key.partition(".")
    field = root.model_fields.get(first)
    if field is None:
        return None
    if not rest:
        return field.annotation
    found = [annotation_of(section, rest) for section in _sections(field.annotation)]
    return next((annotation for annotation in found if annotation is not None), None)


def all_keys(root: type[Section], prefix: str = "") -> list[str]:
    """List every dotted key."""
    keys: dict[str, None] = {}
    for name, field in root.model_fields.items():
        sections = _sections(field.annotation)
        keys[prefix + name] = None
        for section in sections:
            keys.update(dict.fromkeys(all_keys(section, f"{prefix}{name}.")))
    return list(keys)


def _aliases(root: type[Section]) -> list[str]:
    """List the aliases that lead somewhere in `root` and are no keys of it."""
    return [
        alias
        for alias, (key, _) in ALIASES.items()
        if alias not in root.model_fields and annotation_of(root, key) is not None
    ]


def hint(root: type[Section], key: str) -> str:
    """Say which key was probably meant."""
    known = [*_aliases(root), *all_keys(root)]
    last = key.rsplit(".", 1)[-1]
    ends = [k for k in known if k.rsplit(".", 1)[-1] == last]
    close = ends or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "`visiontrain train --help` lists all keys"


# -- errors -------------------------------------------------------------------------


def explain(root: type[Section], tree: Mapping[str, Any], error: ValidationError) -> str:
    """Put the first thing that pydantic found wrong into one line."""
    first = error.errors(include_url=False)[0]
    where = _where(tree, first["loc"])
    got, kind = first.get("input"), first["type"]
    if kind == "extra_forbidden":
        return _unknown(root, tree, where)
    if kind == "missing":
        return f"{where}: not given; add {where}=VALUE"
    if kind in {"union_tag_invalid", "literal_error"}:
        expected = str(first["ctx"].get("expected_tags") or first["ctx"].get("expected"))
        choices = [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",")]
        value = got.get("kind") if isinstance(got, Mapping) else got
        close = difflib.get_close_matches(str(value), choices, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        return f"{where}: {value!r}; {meant}take one of {', '.join(choices)}"
    return f"{where}: {got!r}; {first['msg'][0].lower()}{first['msg'][1:]}"


def _unknown(root: type[Section], tree: Mapping[str, Any], where: str) -> str:
    """Tell a key of another kind from one that does not exist."""
    parent, _, last = where.rpartition(".")
    if annotation_of(root, where) is None:
        return f"{where}: no such key; {hint(root, where)}"
    kinds = _sections(annotation_of(root, parent))
    having = [k.model_fields["kind"].default for k in kinds if last in k.model_fields]
    now = _look(tree, parent)["kind"]
    return f"{where}: {parent}={now} has no such key; {parent}={' or '.join(having)} has"


def _where(tree: Mapping[str, Any], location: Sequence[int | str]) -> str:
    """Write a location as a dotted key, without the kinds that pydantic puts in between."""
    parts: list[str] = []
    for part in location:
        section = _look(tree, ".".join(parts)) if parts else None
        is_kind = isinstance(section, Mapping) and section.get("kind") == part
        if isinstance(part, str) and not is_kind and part not in {"str", "int", "float", "bool"}:
            parts.append(part)
    return ".".join(part for part in parts if not part.startswith(("literal[", "list[")))


def _look(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
