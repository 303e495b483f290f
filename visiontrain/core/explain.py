"""What is wrong with a config, in one line: where, what it got, what would do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from visiontrain.core.errors import ConfigError
from visiontrain.core.keys import FOREIGN, SO_ANYWAY
from visiontrain.core.section import Section, aliases, all_keys, annotation_of, kind_of, sections

LONGEST = 80  # characters of what was got; a wrong value may be a whole file
PLAINER = {"bool_type": "take true or false"}


def short(value: Any) -> str:
    """Write a value on one line, cut where it is long."""
    text = " ".join((value if isinstance(value, str) else repr(value)).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def closest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return what was probably meant, whatever its capitals."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[found[0]] if found else None


def no_such_key(root: type[Section], key: str) -> str:
    """Say which key was probably meant."""
    if key in FOREIGN:
        return f"{key}: no such key; {FOREIGN[key]}"
    if key == "model":
        return "model: no such key; weights=FILE or the folder of a run says what to use"
    known = [*aliases(root), *all_keys(root)]
    last = key.rsplit(".", 1)[-1]
    ends = [k for k in known if k.rsplit(".", 1)[-1] == last]
    meant = ends[0] if ends else closest(key, known, cutoff=0.5)
    advice = f"did you mean {meant}?" if meant else "`visiontrain VERB --help` lists all keys"
    return f"{short(key)}: no such key; {advice}"


def without_idle(root: type[Section], pairs: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Leave out keys of other tools whose values say what is so anyway.

    Raises:
        ConfigError: of all others, where there are several: one at a time would take as many tries.
    """
    ours, left = [], list[str]()
    for key, value in pairs:
        if key not in FOREIGN or annotation_of(root, key) is not None:
            ours.append((key, value))
        elif key not in SO_ANYWAY or value != SO_ANYWAY[key]:
            ours.append((key, value))
            left.append(key)
    if len(left) > 1:
        raise ConfigError("; ".join(f"{key}: no such key, {FOREIGN[key]}" for key in left))
    return ours


def explain(
    root: type[Section],
    layers: Sequence[tuple[str, Mapping[str, Any]]],
    tree: Mapping[str, Any],
    error: ValidationError,
) -> str:
    """Put the first thing that pydantic found wrong into one line.

    Args:
        root: the config's class.
        layers: (file, its tree) of everything that `tree` was merged from, later ones winning;
            no file's name for what was typed.
        tree: what was checked.
        error: what pydantic says about it.
    """
    errors = error.errors(include_url=False)
    where = _where(tree, errors[0]["loc"])
    files = [name for name, layer in reversed(layers) if _look(layer, where) is not None]
    file = f"{files[0]}: " if files and files[0] else ""
    return file + _line(root, tree, where, [e for e in errors if _where(tree, e["loc"]) == where])


def _line(
    root: type[Section], tree: Mapping[str, Any], where: str, errors: Sequence[ErrorDetails]
) -> str:
    first = errors[0]
    got, kind = first["input"], first["type"]
    if kind == "extra_forbidden":
        return _of_another_kind(root, tree, where)
    if kind == "missing" and where.endswith(".own"):
        return f"{where}: not given; it is an object of yours, pass it in Python, see docs/api.md"
    if kind == "missing":
        return f"{where}: not given; add {where}=VALUE"
    if kind in {"union_tag_invalid", "literal_error"} and len(errors) == 1:
        return _choice(where, first)
    if kind == "list_type":
        written = f"[{short(str(got))}]" if got is not None else "[VALUE, VALUE]"
        return f"{where}: {short(repr(got))}; write {written}"
    wanted = dict.fromkeys(PLAINER.get(e["type"], e["msg"]) for e in errors)
    text = " or ".join(
        message if number == 0 else message.removeprefix("Input should be ")
        for number, message in enumerate(wanted)
    )
    return f"{where}: {short(repr(got))}; {text[0].lower()}{text[1:]}"


def _choice(where: str, error: ErrorDetails) -> str:
    """Name the choices, the closest one first."""
    context = error.get("ctx", {})
    expected = str(context.get("expected_tags") or context.get("expected"))
    choices = [choice.strip(" '") for choice in expected.replace(" or ", ",").split(",")]
    choices = [choice for choice in choices if choice != "object"]  # only Python can give one
    got = error["input"]
    value = got.get("kind") if isinstance(got, Mapping) else got
    meant = closest(str(value), choices)
    advice = f"did you mean {meant}? " if meant else ""
    return f"{where}: {short(repr(value))}; {advice}take one of {', '.join(choices)}"


def _of_another_kind(root: type[Section], tree: Mapping[str, Any], where: str) -> str:
    """Tell a key of another kind from one that does not exist."""
    parent, _, last = where.rpartition(".")
    if annotation_of(root, where) is None:
        return no_such_key(root, where)
    kinds = sections(annotation_of(root, parent))
    having = [str(kind_of(k)) for k in kinds if last in k.model_fields]
    having = [kind for kind in having if kind != "object"]  # only Python can give one
    if not having:
        return f"{where}: an object of yours; pass it in Python, see docs/api.md"
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
