"""Settings of `visiontrain compare`, and the runs that its lists name (imports no torch)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from visiontrain.core.config import build, merge, read_tree, read_words
from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import short
from visiontrain.core.section import Section, all_keys, annotation_of, kind_of, sections
from visiontrain.recipe import USES as ALL_USES
from visiontrain.recipe import Run, Scaled
from visiontrain.strategies.config import Client, Single, StrategyConfig
from visiontrain.strategies.federated.config import Federated

Tree = dict[str, Any]
# Keys that no training has.
OWN = (
    *("strategies", "runs", "seeds", "budget", "alone", "check", "check_steps"),
    *Scaled.model_fields,
)
FOLDER = ("out", "project", "name", "resume")  # of the comparison, not of its runs
DEALING = ("clients", "partition", "alpha", "classes")  # keys of who has which images


class CompareConfig(Scaled, Run):
    """A training, and the modes and settings to repeat it in."""

    strategies: list[str | dict[str, Any]] = Field(
        [], description="modes to train in, each with keys of its own: ddp:KEY=VALUE+KEY=VALUE"
    )
    runs: list[dict[str, Any]] = Field(
        [], description="in YAML: more runs, each with any keys of its own, and a name if wanted"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        [], description="seeds to repeat every run with, for a mean and a spread; default: seed"
    )
    budget: Literal["samples", "epochs", "seconds"] = Field(
        "samples", description="what every run gets as much of as the control run"
    )
    alone: bool = Field(
        True, description="beside federated: also train each client alone, and show the best"
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
LONGEST = 160  # bytes of a name; file systems take 255, and a seed follows
ANY = tuple(name for name in ALL_USES["train"] if name not in (*FOLDER, "seed"))  # a run may vary


@dataclass(frozen=True, slots=True)
class Mode:
    """A run of a comparison but for its seed: a mode, and what else is its own."""

    name: str  # of its row and of its run's folder
    strategy: StrategyConfig  # keys that nobody gave are unset
    keys: Tree = field(default_factory=dict)  # other keys of its own, nested
    rivals: Sequence[StrategyConfig] = ()  # of a row that shows the best of these instead
    beside: str = ""  # the federated mode that has to beat it, and says how long it trains

    def members(self) -> list[Mode]:
        """Return what is trained for the row: itself, or each of those it shows the best of."""
        if not self.rivals:
            return [self]
        return [
            replace(self, name=f"{self.name}-number={n}", strategy=rival, rivals=())
            for n, rival in enumerate(self.rivals)
        ]


def modes(config: CompareConfig) -> list[Mode]:
    """Read the lists of modes and runs; a mode also takes what `strategy.KEY=VALUE` says.

    Raises:
        ConfigError: naming the entry, or a key that none of them knows.
    """
    shared = shared_keys(config)
    found = [_mode(_entry(entry), shared) for entry in config.strategies]
    found += [_varied(entry, shared) for entry in config.runs]
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
    return [*found, *(_alone(found) if config.alone else ())]


def seeds(config: CompareConfig) -> list[int]:
    """Return the seeds that every run is repeated with.

    Raises:
        ConfigError: one stands there twice, or `seed` says another.
    """
    if config.seeds and config.seed not in {0, *config.seeds}:
        raise ConfigError(f"seed: {config.seed} beside seeds, which are all that run; take seed=0")
    found = list(config.seeds) or [config.seed]
    twice = next((seed for seed in found if found.count(seed) > 1), None)
    if twice is not None:
        raise ConfigError(f"seeds: {twice} stands there twice; name each seed once")
    return found


def shared_keys(config: CompareConfig) -> Tree:
    """Return what `strategy.KEY=VALUE` said."""
    given = config.strategy
    tree = given.model_dump(exclude_unset=True) if isinstance(given, Section) else given
    return {key: value for key, value in tree.items() if key != "kind"}


def run_of(config: CompareConfig, mode: Mode, changes: Mapping[str, Any]) -> Run:
    """Return the training of one mode, as far as anybody said what it is.

    Args:
        config: of the comparison.
        mode: which one.
        changes: plain keys to set on top, such as its seed.

    Raises:
        ConfigError: of the first thing that is wrong.
    """
    strategy = mode.strategy.model_dump(exclude_unset=True) | {"kind": mode.strategy.kind}
    given = config.model_dump(exclude_unset=True, exclude={*OWN, *FOLDER, "strategy"})
    if isinstance(mode.strategy, Single | Client) and "," in config.device:
        given["device"] = config.device.partition(",")[0]  # of those that all share
    if isinstance(mode.strategy, Federated | Client):  # who deal images out know no windows
        given.get("data", {}).pop("window", None)
    tree = merge(Run, given, mode.keys) | {"strategy": strategy, **changes}
    model, weights = tree.get("model"), tree.get("weights")
    if model and "kind" not in model and weights is not None:
        from visiontrain.engine.weights import load_meta  # noqa: PLC0415 - torch

        tree["model"] = {**model, "kind": load_meta(str(weights)).model["kind"]}
    return build(Run, tree)


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


def _varied(entry: Mapping[str, Any], shared: Tree) -> Mode:
    """Read a run of the list `runs`: any keys, and perhaps a name."""
    keys = {str(key): value for key, value in entry.items()}
    name = keys.pop("name", None)
    tree = read_tree(Run, keys, "runs", ANY)
    own = tree.pop("strategy", {})
    mode = _mode({"kind": own.get("kind", "single"), **own}, shared)
    if name is None:
        words = "+".join(f"{key}={_text(value)}" for key, value in flat(tree))
        name = "-".join(part for part in (mode.name if own else "", words) if part) or mode.name
    return replace(mode, name=_plain(str(name)), keys=tree)


def flat(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _alone(found: Sequence[Mode]) -> Iterator[Mode]:
    """Yield what federated runs are compared with: their clients without each other."""
    names: set[str] = set()
    for mode in found:
        if not isinstance(mode.strategy, Federated) or mode.strategy.clients == 1:
            continue
        given = mode.strategy.model_dump(include=set(DEALING))
        unset = mode.strategy.model_fields_set
        dealt = {key: value for key, value in given.items() if key in unset or key == "clients"}
        rivals = [Client(number=number, **dealt) for number in range(given["clients"])]
        given = {key: value for key, value in given.items() if key in unset}
        name = _name({"kind": "alone", **given})
        if mode.keys or name in names:  # of another length, if it is not the same again
            name = f"{mode.name}-alone"
        names.add(name)
        yield Mode(name, rivals[0], mode.keys, rivals, mode.name)


def _kinds() -> list[type[Section]]:
    return sections(annotation_of(Run, "strategy"))


def _is_default(key: str, value: Any) -> bool:
    """Tell whether a key, such as one of another run's config.yaml, only says what holds anyway."""
    fields = [kind.model_fields[key] for kind in _kinds() if key in kind.model_fields]
    return bool(fields) and all(field.default == value for field in fields)


def _name(own: Tree) -> str:
    """Name a mode after its own keys, in letters that any file system and shell takes."""
    keys = "+".join(f"{key}={_text(value)}" for key, value in own.items() if key != "kind")
    return _plain(f"{own['kind']}-{keys}" if keys else str(own["kind"]))


def _plain(name: str) -> str:
    plain = re.sub(r"[^\w.=+-]+", "-", name).strip(".") or "run"
    if len(plain.encode()) <= LONGEST:
        return plain
    digest = hashlib.sha256(plain.encode()).hexdigest()[:8]
    return f"{plain.encode()[:LONGEST].decode(errors='ignore')}-{digest}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
