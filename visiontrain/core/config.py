"""Config: how preset files, `key=value` and Python values become a checked section.

What is typed wins over presets, a later preset over an earlier one, wherever it stands in the line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import ValidationError

from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import closest, explain, no_such_key, short, without_idle
from visiontrain.core.keys import ALIASES, MAIN_FIELD, STRATEGY_ALIASES
from visiontrain.core.section import (
    Section,
    aliases,
    all_keys,
    annotation_of,
    kind_of,
    options,
    sections,
)
from visiontrain.core.shipped import presets as presets_in
from visiontrain.core.yaml_loader import load_yaml

Tree = dict[str, Any]
Below = Callable[[Tree], Mapping[str, Any]]
MAX_EXTENDS = 8
WEIGHTS = (".safetensors", ".pt", ".pth")  # what YOLO users give as a model
NULLS = {"", "~", "null", "Null", "NULL"}

S = TypeVar("S", bound=Section)


def datasets_folder() -> Path | None:
    """Return $VISIONTRAIN_DATASETS, where relative data set paths are also looked for."""
    text = os.environ.get("VISIONTRAIN_DATASETS")
    return Path(text).expanduser() if text else None


def wandb_key_set() -> bool:
    """Say whether $WANDB_API_KEY is set: else wandb sends nothing unless a config says online."""
    return bool(os.environ.get("WANDB_API_KEY"))


def load(
    root: type[S],
    arguments: Sequence[str],
    presets: Path,
    uses: Collection[str] | None = None,
    below: Below | None = None,
) -> S:
    """Make a `root` from the words of a command line.

    Args:
        root: the config's class.
        arguments: PRESET names or files, `key=value`, `--key=value` or `--key value`; what names
            a file is one, for names of runs may hold a `=`.
        presets: folder in which preset names are looked up.
        uses: keys and sections that may be typed, all where None; a preset may hold others.
        below: tells what the result will lie on: its kinds hold where none is named.

    Raises:
        ConfigError: one line: where, what it got, what would do.
    """
    words = list(_joined(arguments))
    files = [word for word in words if "=" not in word or _is_file(Path(word))]
    layers = [(_shown(file, presets), read_preset(root, file, presets)) for file in files]
    typed = read_words(root, [word for word in words if word not in files], uses)
    return _checked(root, [*layers, ("", typed)], below)


def from_keys(
    root: type[S],
    keys: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    uses: Collection[str] | None = None,
    below: Below | None = None,
) -> S:
    """Make a `root` from Python values by the same names, aliases and rules.

    Args:
        root: the config's class.
        keys: names, dotted names or aliases, and their values.
        base: what a preset says (`read_preset`); `keys` go on top.
        uses: as for `load`.
        below: as for `load`.

    Raises:
        ConfigError: as `load`.
    """
    given = _tree(root, ((key, _plain(value)) for key, value in keys.items()), uses)
    return _checked(root, [("preset", base or {}), ("", given)], below)


def build(root: type[S], tree: Mapping[str, Any]) -> S:
    """Check a tree of plain values.

    Raises:
        ConfigError: as `load`, of the first thing that is wrong.
    """
    return _checked(root, [("", tree)])


def _checked(
    root: type[S], layers: Sequence[tuple[str, Mapping[str, Any]]], below: Below | None = None
) -> S:
    """Put (file, tree) layers on top of each other and check the result."""
    tree: Tree = {}
    for _, layer in layers:
        tree = merge(root, tree, layer)
    tree = _with_kinds(root, tree, below)
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(root, layers, tree, error)) from None


def _with_kinds(root: type[Section], tree: Tree, below: Below | None) -> Tree:
    """Name the kind of sections that leave it open: that of what lies below, or the default."""
    many = [name for name in tree if len(sections(annotation_of(root, name))) > 1]
    vague = [name for name in many if isinstance(tree[name], Mapping) and "kind" not in tree[name]]
    base = below(tree) if below and vague else {}
    out = dict(tree)
    for name in vague:
        default = kind_of(type(root.model_fields[name].default))
        out[name] = {"kind": base.get(name, {}).get("kind", default), **tree[name]}
    return out


def merge(root: type[Section], old: Mapping[str, Any], new: Mapping[str, Any]) -> Tree:
    """Put `new` over `old`; where it names another kind, that kind's keys of `old` stay."""
    out = dict(old)
    for key, value in new.items():
        before, field = out.get(key), root.model_fields.get(key)
        if field and isinstance(before, Mapping) and isinstance(value, Mapping):
            kept = _kept(sections(field.annotation), before, value)
            if "source" in value:  # other data take the place of a data set in Python
                kept = {name: part for name, part in kept.items() if name != "own"}
            out[key] = {**kept, **value}
        else:
            out[key] = value
    return out


def _kept(
    kinds: Sequence[type[Section]], before: Mapping[str, Any], value: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return what of `before` still has a meaning under the kind that `value` names."""
    chosen = [section for section in kinds if kind_of(section) == value.get("kind")]
    if len(kinds) == 1 or not chosen or before.get("kind") == value.get("kind"):
        return before
    return {key: part for key, part in before.items() if key in chosen[0].model_fields}


# -- presets ------------------------------------------------------------------------


def read_preset(root: type[Section], name: str, presets: Path, depth: int = 0) -> Tree:
    """Read a config file, or a preset by name, and what it `extends`.

    Raises:
        ConfigError: when there is none, or it is not a mapping of known keys.
    """
    path = _find_preset(name, presets)
    if path is None:
        raise ConfigError(_no_preset(root, name, presets))
    if depth > MAX_EXTENDS:
        raise ConfigError(f"{path}: extends more than {MAX_EXTENDS} deep; does it extend itself?")
    content = load_yaml(_text(path), str(path)) or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a {type(content).__name__}; write key: value lines")
    if {"names", "nc"} & content.keys():
        raise ConfigError(f"{path}: describes a data set; write data={path}")
    base = content.pop("extends", None)
    below = read_preset(root, _beside(path, str(base)), presets, depth + 1) if base else {}
    return merge(root, below, read_tree(root, content, str(path)))


def read_tree(
    root: type[Section], content: Mapping[Any, Any], where: str, uses: Collection[str] | None = None
) -> Tree:
    """Read keys and aliases as they stand in a file.

    Args:
        root: the config's class.
        content: keys, dotted or nested, and their values.
        where: what errors call the file.
        uses: as for `load`.

    Raises:
        ConfigError: of a key that is not known, or not used.
    """
    try:
        return _tree(root, ((str(key), value) for key, value in content.items()), uses)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _find_preset(name: str, presets: Path) -> Path | None:
    if _is_file(Path(name)):
        return Path(name)
    known = presets_in(presets)
    stems = {path.stem: path for path in known.values()}
    return known.get(name.removesuffix(".yaml")) or stems.get(name.removesuffix(".yaml"))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # such as a name of 5,000 characters
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {short(str(error))}; give a YAML file in UTF-8") from None


def _no_preset(root: type[Section], name: str, presets: Path) -> str:
    if name in all_keys(root) or name in aliases(root):
        return f"{name}: no value; write {name}=VALUE"
    if _is_folder(Path(name)):
        return f"{name}: a folder, and no key=value; for a data set write data={name}"
    known = presets_in(presets)
    meant = closest(name, [*known, *all_keys(root)])
    advice = f"did you mean {meant}?" if meant else f"presets: {', '.join(known)}"
    return f"{short(name)}: no such file or preset, and no key=value; {advice}"


def _beside(path: Path, base: str) -> str:
    near = path.parent / base
    return str(near) if _is_file(near) else base


def _shown(name: str, presets: Path) -> str:
    """Return what to call a preset in an error: the path of a file of the user's own."""
    return name if _is_file(Path(name)) else str(_find_preset(name, presets))


# -- words --------------------------------------------------------------------------


def _joined(arguments: Sequence[str]) -> Iterator[str]:
    """Turn `--key value`, `--key=value` and `key = value` into `key=value`."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        if words and words[0] == "=":
            word, words = word + "".join(words[:2]), words[2:]
        elif word.startswith("--") and "=" not in word:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word}: no value; write {word[2:]}=VALUE")
            word = f"{word}={words.pop(0)}"
        yield word.removeprefix("--")


def read_words(
    root: type[Section], words: Iterable[str], uses: Collection[str] | None = None
) -> Tree:
    """Read words `key=value`, unchecked but for the keys.

    Args:
        root: the config's class.
        words: dotted keys or aliases, and the text of their values.
        uses: as for `load`.

    Raises:
        ConfigError: of a key that is not known, or not used, or a value that is not YAML.
    """
    pairs = ((key.strip(), text.strip()) for key, _, text in (w.partition("=") for w in words))
    return _tree(root, ((key, _scalar(root, key, text)) for key, text in pairs), uses)


def _scalar(root: type[Section], key: str, text: str) -> Any:
    """Read a value from the command line; where text fits, it is taken as it stands."""
    key = ALIASES[key][0] if key in aliases(root) else key
    allowed = options(annotation_of(root, key))
    lists = [option for option in allowed if get_origin(option) is list]
    if any(text in get_args(option) for option in allowed if get_origin(option) is Literal):
        return text
    if lists and text[:1] not in ("[", ""):
        if text in NULLS:
            return None
        parts = [part.strip() for part in text.split(",")]
        numbers = any({int, float} & {*options(get_args(option)[0])} for option in lists)
        return [load_yaml(part, key) for part in parts] if numbers else parts
    if sections(annotation_of(root, key)) and not text.startswith("{"):
        allowed = options(annotation_of(root, _main(key)))
    if str in allowed:  # never YAML: a glob such as *.jpg would be an alias
        return None if text in NULLS else text
    return load_yaml(text, key)


def _plain(value: Any) -> Any:
    """Turn Python values that stand for text into text; sections into mappings."""
    if isinstance(value, Section):
        kind = value.model_dump(include={"kind"})
        return value.model_dump(exclude_unset=True) | kind
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, tuple | range):
        return list(value)
    return str(value) if isinstance(value, Path) else value


# -- keys ---------------------------------------------------------------------------


def _tree(
    root: type[Section], pairs: Iterable[tuple[str, Any]], uses: Collection[str] | None = None
) -> Tree:
    tree: Tree = {}
    named: dict[str, str] = {}  # key -> the name by which it was given first
    for key, value in without_idle(root, pairs):
        target = ALIASES[key][0] if key in aliases(root) else key
        if sections(annotation_of(root, target)) and not isinstance(value, Mapping):
            target = _main(target)
        before = _get(tree, target)
        _assign(root, tree, key, value, uses)
        first, now = named.setdefault(target, key), _get(tree, target)
        if first != key and before != now:
            raise ConfigError(
                f"{key}: {target}={short(str(now))}, but {first} made it {short(str(before))}; "
                "they are one key, leave one out"
            )
    return tree


def _get(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _assign(
    root: type[Section], tree: Tree, key: str, value: Any, uses: Collection[str] | None
) -> None:
    """Set a dotted key or alias in `tree`; a scalar given to a section sets its main field."""
    if key in aliases(root):
        key, turn = ALIASES[key]
        value = turn(value)
    annotation = annotation_of(root, key)
    if sections(annotation):
        if isinstance(value, Mapping):
            for name, part in value.items():
                _assign(root, tree, f"{key}.{name}", part, uses)
            return
        key, section = _main(key), key
        if annotation_of(root, key) is None:
            some = next(iter(sections(annotation)[0].model_fields))
            raise ConfigError(f"{section}: {short(repr(value))}; write {section}.{some}=VALUE")
    elif annotation is None:
        raise ConfigError(no_such_key(root, key))
    if uses is not None and not any(f"{key}.".startswith(f"{used}.") for used in uses):
        advice = "the weights say which" if key.startswith("model.") else "leave it out"
        raise ConfigError(f"{key}: {short(repr(value))}; it would change nothing here, {advice}")
    if key == "model.kind" and str(value).endswith(WEIGHTS):
        raise ConfigError(
            f"model: {short(str(value))}; weights=FILE starts from one of ours, files of other "
            "tools cannot be read"
        )
    if key == "strategy.kind" and isinstance(value, str):
        value = STRATEGY_ALIASES.get(value, value)
    _set(tree, key, value)


def _set(tree: Tree, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _main(key: str) -> str:
    """Return what a scalar given to a section sets."""
    return f"{key}.{MAIN_FIELD.get(key, 'kind')}"
