"""Settings of `visiontrain compare`, and the modes that its list names (imports no torch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from visiontrain.core.config import build, read_tree, read_words
from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import short
from visiontrain.core.section import Section, all_keys, annotation_of, kind_of, sections
from visiontrain.recipe import USES as ALL_USES
from visiontrain.recipe import Run
from visiontrain.strategies.config import Single, StrategyConfig

Tree = dict[str, Any]
OWN = ("strategies", "check", "check_steps")  # keys that no training has
FOLDER = ("out", "project", "name", "resume")  # of the comparison, not of its runs


class CompareConfig(Run):
    """A training, and the modes to repeat it in."""

    strategies: list[str | dict[str, Any]] = Field(
        [], description="modes to train in, each with keys of its own: ddp:KEY=VALUE+KEY=VALUE"
    )
    # Not yet of one kind: each mode takes the keys that it knows.
    strategy: Annotated[  # pyrefly: ignore
        dict[str, Any] | StrategyConfig, Field(union_mode="left_to_right")
    ] = Single()
    check: bool = Field(True, description="measure how exact each mode is, as parity does, in fp64")
    check_steps: int = Field(3, ge=1, description="optimizer steps that are measured for that")
    name: str = Field("compare", description="name of the folder of all runs, numbered when taken")


USES = (  # as recipe.USES: what may be typed
    *OWN,
    *(name for name in ALL_USES["train"] if name != "strategy"),
    *(key for key in all_keys(Run) if key.startswith("strategy.") and key != "strategy.kind"),
)


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode of a comparison."""

    name: str  # of its row and of its run's folder
    strategy: StrategyConfig  # keys that nobody gave are unset


def modes(config: CompareConfig) -> list[Mode]:
    """Read the list of modes; each also takes what `strategy.KEY=VALUE` says and it knows.

    Raises:
        ConfigError: naming the entry, or a key that none of them knows.
    """
    shared = shared_keys(config)
    found = [_mode(_entry(entry), shared) for entry in config.strategies]
    names = [mode.name for mode in found]
    if not names:
        raise ConfigError("strategies: not given; add strategies=single,ddp")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"strategies: {twice} stands there twice; name each mode once")
    for key, value in shared.items():
        known = any(key in type(mode.strategy).model_fields for mode in found)
        if not known and not _is_default(key, value):
            raise ConfigError(
                f"strategy.{key}: {short(value)}; none of {', '.join(names)} has such a key, "
                "leave it out"
            )
    return found


def shared_keys(config: CompareConfig) -> Tree:
    """Return what `strategy.KEY=VALUE` said."""
    given = config.strategy
    tree = given.model_dump(exclude_unset=True) if isinstance(given, Section) else given
    return {key: value for key, value in tree.items() if key != "kind"}


def run_of(config: CompareConfig, mode: Mode, out: str | None, *, resume: bool = False) -> Run:
    """Return the training of one mode, as far as anybody said what it is.

    Raises:
        ConfigError: of the first thing that is wrong.
    """
    strategy = mode.strategy.model_dump(exclude_unset=True) | {"kind": mode.strategy.kind}
    given = config.model_dump(exclude_unset=True, exclude={*OWN, *FOLDER, "strategy"})
    return build(Run, given | {"strategy": strategy, "out": out, "resume": resume})


def _entry(entry: str | Mapping[str, Any]) -> Tree:
    """Read `ddp:sync_every=8+outer=diloco`, or the same as a mapping."""
    if isinstance(entry, str):
        tree = read_words(Run, _words(entry))
    else:
        tree = read_tree(Run, {"strategy": entry}, "strategies")
    own = tree.get("strategy", {})
    if not own.get("kind"):
        raise ConfigError(
            f"strategies: {short(repr(entry))}; begin with a mode, as ddp or {{kind: ddp}}"
        )
    return own


def _words(entry: str) -> list[str]:
    """Turn an entry into words; a part without a key is the next value of the list before it."""
    kind, _, rest = entry.partition(":")
    words = [f"strategy={kind}"]
    for part in rest.split("+") if rest else []:
        if "=" in part:
            words.append(f"strategy.{part}")
        elif len(words) > 1:
            words[-1] += f",{part}"
        else:
            raise ConfigError(f"strategies: {short(repr(entry))}; write MODE:KEY=VALUE+KEY=VALUE")
    return words


def _mode(own: Tree, shared: Tree) -> Mode:
    kind = own["kind"]
    section = next((s for s in _kinds() if kind_of(s) == kind), Section)
    known = {key: value for key, value in shared.items() if key in section.model_fields}
    return Mode(_name(own), build(Run, {"strategy": known | own}).strategy)


def _kinds() -> list[type[Section]]:
    return sections(annotation_of(Run, "strategy"))


def _is_default(key: str, value: Any) -> bool:
    """Tell whether a key, such as one of another run's config.yaml, only says what holds anyway."""
    fields = [kind.model_fields[key] for kind in _kinds() if key in kind.model_fields]
    return bool(fields) and all(field.default == value for field in fields)


def _name(own: Tree) -> str:
    """Name a mode after its own keys, in letters that any file system and shell takes."""
    keys = "+".join(f"{key}={_text(value)}" for key, value in own.items() if key != "kind")
    return re.sub(r"[^\w.=+-]+", "-", f"{own['kind']}-{keys}" if keys else str(own["kind"]))


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
