"""YAML as people mean it: version 1.2 scalars, no repeated keys, no alias bombs, no objects."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from visiontrain.core.errors import ConfigError

MAX_ALIASES = 50  # a list of lists of aliases grows without bound in a few hundred bytes
MAX_CHARACTERS = 10_000_000
MAX_DEPTH = 50

CORE_SCHEMA = {  # YAML 1.2, section 10.3; first character -> what it may be
    "tag:yaml.org,2002:null": (r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": (r"^(?:[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+)$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        "-+0123456789.",
    ),
}


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the rules above. `no`, `on`, 007 and dates stay strings."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - filled once, below

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.aliases = 0
        self.open: list[str | None] = []  # anchors of the nodes around this one

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse what grows without bound, and tags: they make objects."""
        event = self.peek_event()
        self.aliases += isinstance(event, yaml.AliasEvent)
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        problems = {
            f"more than {MAX_ALIASES} aliases": self.aliases > MAX_ALIASES,
            f"nested more than {MAX_DEPTH} deep": len(self.open) > MAX_DEPTH,
            f"{anchor} contains itself": anchor is not None and anchor in self.open,
            f"tag {tag}": tag not in {None, "!", "tag:yaml.org,2002:str"},
        }
        for problem in (text for text, found in problems.items() if found):
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: {problem}")
        self.open.append(anchor)
        node = super().compose_node(parent, index)
        self.open.pop()
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse repeated keys: the first would be lost without a word."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} twice")
            seen.add(key if isinstance(key, Hashable) else id(key))
        return super().construct_mapping(node, deep=deep)


for _tag, (_pattern, _first) in CORE_SCHEMA.items():
    for _character in _first:
        _resolvers = Loader.yaml_implicit_resolvers.setdefault(_character.replace("\0", ""), [])
        _resolvers.append((_tag, re.compile(_pattern)))


def load_yaml(text: str, where: str) -> Any:
    """Read one YAML document.

    Args:
        text: the document; a byte order mark is ignored.
        where: what to call it in an error, a path or a key.

    Raises:
        ConfigError: with the line, when it is not YAML, repeats a key, or grows without bound.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters; at most {MAX_CHARACTERS}")
    try:
        return yaml.load(text.removeprefix("\ufeff"), Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}{line}: {error.problem}; write plain YAML") from error
    except (yaml.YAMLError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise ConfigError(f"{where}: {problem}; write plain YAML") from error


def dump_yaml(tree: Any) -> str:
    """Write `tree` so that `load_yaml` reads the same again."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True)


class Dumper(yaml.SafeDumper):
    """Quotes strings that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out."""
        del data
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Quote what version 1.2 would not read as text; PyYAML itself minds version 1.1."""
        plain = not any(re.match(pattern, data) for pattern, _ in CORE_SCHEMA.values())
        return self.represent_scalar("tag:yaml.org,2002:str", data, None if plain else "'")


Dumper.add_representer(str, Dumper.represent_str)
