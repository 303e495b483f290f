"""Objects that a user passes in Python: a name in the config, the object itself beside it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from visiontrain.core.errors import ConfigError
from visiontrain.core.section import Section

if TYPE_CHECKING:  # it imports torch, which takes seconds, and every config imports this
    from visiontrain.core.types import Sample

Objects = Mapping[str, Any]  # dotted key -> what was passed for it
KIND = "object"
NONE: Objects = MappingProxyType({})
ARGUMENTS = {  # key -> the argument of `train` that fills it
    "data.own": "data",
    "model.own": "model",
    "augment.own": "augment",
    "task.loss": "loss",
    "log.own": "logger",
}

OPTIONAL = ("augment", "loss", "logger")  # None is as if not given

S = TypeVar("S", bound=Section)


class DataSet(Protocol):
    """Anything with a length that gives samples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`: the same every time, so that a run can be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """Data sets of a user's own: `visiontrain.train(data=Data(train=..., val=..., names=...))`."""

    train: DataSet
    val: DataSet
    names: Sequence[str]  # of the classes, in the order of their numbers
    test: DataSet | None = None


class Own:
    """An object of the user's. Files keep its name alone: nothing is ever imported from there.

    No dataclass: pydantic would take that apart.
    """

    def __init__(self, ref: str, value: Any = None) -> None:
        self.ref = ref  # module:name
        self.value = value

    def __eq__(self, other: object) -> bool:
        """Compare by name: the objects themselves need not be comparable."""
        return isinstance(other, Own) and other.ref == self.ref

    def __hash__(self) -> int:
        """Hash by name."""
        return hash(self.ref)

    def __repr__(self) -> str:
        """Show the name."""
        return self.ref

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Take an `Own`, or what a file says of one; write only that into JSON."""
        del source, handler
        return core_schema.no_info_plain_validator_function(
            _validated,
            serialization=core_schema.plain_serializer_function_ser_schema(
                _written, when_used="json"
            ),
        )


def _validated(given: Any) -> Own:
    match given:
        case Own():
            return given
        case {"kind": "object", "ref": str(ref), **rest} if not rest:
            return Own(ref)
    raise PydanticCustomError("own", "an object of yours; pass it in Python, see docs/api.md")


def _written(own: Own) -> dict[str, str]:
    return {"kind": KIND, "ref": own.ref}


def named(argument: str, value: Any) -> Own:
    """Give an object the name by which files know it; of our adapter, that of what it `wraps`.

    Raises:
        ConfigError: it is a lambda, which has none.
    """
    thing = value.train if isinstance(value, Data) else value
    if type(thing).__module__.startswith("visiontrain."):  # an adapter of ours
        thing = getattr(thing, "wraps", thing)
    described = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    name, module = described.__qualname__, described.__module__
    if "<lambda>" in name:
        raise ConfigError(
            f"{argument}: a lambda, which has no name that config.yaml could keep; write it as a "
            "function with def"
        )
    script = getattr(sys.modules.get(module), "__file__", None)
    if module == "__main__" and script:
        module = Path(script).stem  # by which another script can import it
    return Own(f"{module}:{name}", value)


def taken_apart(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Give objects among the arguments of `train` the keys that they are kept under.

    Raises:
        ConfigError: of a lambda, or a value where only an object can be.
    """
    found: dict[str, Any] = {}
    for given, value in arguments.items():
        argument = ARGUMENTS.get(given, given)
        key = next((key for key, name in ARGUMENTS.items() if name == argument), None)
        section = (key or "").partition(".")[0]
        nested = isinstance(value, Mapping) and _is_object(value.get("own")) and section == argument
        if key is None or not (nested or _is_object(value)):
            if value is not None or given not in OPTIONAL:
                found[given] = _no_object(given, value)
            continue
        own = named(argument, value["own"] if nested else value)
        if nested:
            found |= {f"{section}.{name}": part for name, part in value.items() if name != "own"}
        found[key] = own
        if argument == "model":
            found["model.kind"] = KIND
        if argument == "data":
            found["data.source"] = own.ref
    return found


def _no_object(argument: str, value: Any) -> Any:
    """Pass on a value that is no object, where there may be another.

    Raises:
        ConfigError: there may be none.
    """
    if argument in ("loss", "logger"):
        raise ConfigError(
            f"{argument}: {value!r}; pass one function or object of yours, see docs/api.md"
        )
    return value


def passed(keys: Mapping[str, Any]) -> Objects:
    """Return the objects among keys that were `taken_apart`."""
    return {key: value.value for key, value in keys.items() if isinstance(value, Own)}


def _is_object(value: Any) -> bool:
    plain = str | Path | bool | int | float | Mapping | Section | list | tuple | None
    return not isinstance(value, plain)


def objects_of(section: Section) -> dict[str, Any]:
    """Return the objects that a config holds, by their dotted keys."""
    found: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Own) and value.value is not None:
            found[name] = value.value
        elif isinstance(value, Section):
            found |= {f"{name}.{key}": one for key, one in objects_of(value).items()}
    return found


def with_objects(section: S, objects: Objects) -> S:
    """Put objects back into a config that came out of a file or another process."""
    changes: dict[str, Any] = {}
    for name in section.__class__.model_fields:
        value = getattr(section, name)
        if isinstance(value, Own) and name in objects:
            changes[name] = Own(value.ref, objects[name])
        below = {
            key.removeprefix(f"{name}."): one
            for key, one in objects.items()
            if key.startswith(f"{name}.")
        }
        if below:
            changes[name] = with_objects(value, below)
    return section.model_copy(update=changes) if changes else section


def missing(section: Section, prefix: str = "") -> dict[str, str]:
    """Name what a config holds by name only: dotted key -> module:name."""
    found: dict[str, str] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Own) and value.value is None:
            found[prefix + name] = value.ref
        elif isinstance(value, Section):
            found |= missing(value, f"{prefix}{name}.")
    return found


def refuse_missing(section: Section, call: str, prefix: str = "") -> None:
    """Refuse a config whose objects are not here.

    Args:
        section: the config.
        call: how to start what was asked for, such as `visiontrain.train("config.yaml", {})`;
            {} stands for the arguments.
        prefix: of the section's keys.

    Raises:
        ConfigError: with the call that passes them.
    """
    lacking = missing(section, prefix)
    if lacking:
        passed = ", ".join(_argument(key, ref) for key, ref in lacking.items())
        modules = ", ".join(dict.fromkeys(ref.partition(":")[0] for ref in lacking.values()))
        first = next(iter(lacking))
        raise ConfigError(
            f"{first}: {lacking[first]} is an object of Python, and nothing is imported from a "
            f"config; with it from {modules}: {call.format(passed)}"
        )


def _argument(key: str, ref: str) -> str:
    """Write the argument that passes an object."""
    name = ref.partition(":")[2]
    return (
        f"{ARGUMENTS[key]}={f'visiontrain.Data({name}(...), ...)' if key == 'data.own' else name}"
    )
