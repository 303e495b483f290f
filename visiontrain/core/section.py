"""Section: what every part of the config is, and the dotted keys that lead through sections."""

from __future__ import annotations

import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict

from visiontrain.core.keys import ALIASES


class Section(BaseModel):
    """A part of the config. Values are checked when made and never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def options(annotation: Any) -> list[Any]:
    """List what an annotation allows, unions and Annotated taken apart."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [option for part in get_args(annotation) for option in options(part)]
    return [annotation]


def sections(annotation: Any) -> list[type[Section]]:
    """List the sections an annotation allows: several where `kind` tells them apart."""
    return [o for o in options(annotation) if isinstance(o, type) and issubclass(o, Section)]


def kind_of(section: type[Section]) -> str | None:
    """Return the `kind` that a section is known by, or its default one."""
    field = section.model_fields.get("kind")
    return field.default if field else None


def annotation_of(root: type[Section], key: str) -> Any:
    """Return the type of a dotted key, None when there is no such key."""
    first, _, rest = key.partition(".")
    field = root.model_fields.get(first)
    if field is None:
        return None
    if not rest:
        return field.annotation
    found = [annotation_of(section, rest) for section in sections(field.annotation)]
    return next((annotation for annotation in found if annotation is not None), None)


def all_keys(root: type[Section], prefix: str = "") -> list[str]:
    """List every dotted key."""
    keys: dict[str, None] = {}
    for name, field in root.model_fields.items():
        keys[prefix + name] = None
        for section in sections(field.annotation):
            keys.update(dict.fromkeys(all_keys(section, f"{prefix}{name}.")))
    return list(keys)


def aliases(root: type[Section]) -> list[str]:
    """List the aliases that lead somewhere in `root` and are no keys of it."""
    return [
        alias
        for alias, (key, _) in ALIASES.items()
        if alias not in root.model_fields and annotation_of(root, key) is not None
    ]
