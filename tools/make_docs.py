"""Write the help pages and cfg/README.md from the config's classes.

`python tools/make_docs.py` writes them; `--check` only tells whether they are current.
"""

from __future__ import annotations

import json
import sys
import textwrap
import types
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from help_texts import EXAMPLES, NOTES
from pydantic_core import PydanticUndefined

from visiontrain.cli import VERBS
from visiontrain.compare_config import OWN as COMPARED
from visiontrain.compare_config import USES as COMPARE_USES
from visiontrain.compare_config import CompareConfig
from visiontrain.core.keys import ALIASES, MAIN_FIELD
from visiontrain.core.own import KIND, Own
from visiontrain.core.section import (
    Section,
    all_keys,
    annotation_of,
    kind_of,
    options,
    sections,
)
from visiontrain.core.shipped import presets
from visiontrain.data.config import SHARDING_USES, ShardingConfig
from visiontrain.federated_config import CONFIGS
from visiontrain.federated_config import USES as FEDERATED_USES
from visiontrain.plan_config import OWN as PLANNED
from visiontrain.plan_config import USES as PLAN_USES
from visiontrain.plan_config import PlanConfig
from visiontrain.planning import KNOWN
from visiontrain.predict_config import PredictConfig
from visiontrain.prepare import CLASSIFYING
from visiontrain.recipe import USES, Run
from visiontrain.scoring import SCORING

WIDTH = 93  # of what stands beside a key's name
Row = tuple[str, str, str, str]  # key, type, default, meaning
LIKE_TRAIN = ("parity", "plan", "compare")  # verbs with most of its keys


def meanings(kinds: Collection[type[Section]]) -> str:
    """Say in a line per kind what it is."""
    return "\n".join(
        f"{kind_of(k)}: {(k.__doc__ or '').splitlines()[0].rstrip('.')}" for k in kinds
    )


TOP = Path(__file__).resolve().parent.parent
PAGES = TOP / "visiontrain" / "help"
ROOTS: dict[str, type[Section]] = {
    "train": Run,
    "val": Run,
    "predict": PredictConfig,
    "check": Run,
    "data": ShardingConfig,
    "parity": Run,
    "plan": PlanConfig,
    "compare": CompareConfig,
}
TYPED = USES | {
    "compare": COMPARE_USES,
    "data": SHARDING_USES,
    # Others may stand in a run's config.yaml, with their defaults.
    "plan": [u for u in PLAN_USES if u != "strategy"]
    + [f"strategy.{key}" for key in ("kind", *sorted(KNOWN - {"kind"}))],
}  # what each verb may be told
# Modes of training, where a verb takes but some.
MODES = {"val": SCORING, "plan": ("single", "ddp", "fsdp", "pipeline")}
TRY = {"train": "train detect/bccd", "compare": "compare compare/digits"}  # with a preset

OWN = {  # rows that mean something else to a verb
    "check": {
        "imgsz": (
            "imgsz",
            "integer",
            "as the data set advises, or 640",
            "side of the square input that sizes of boxes are told for, pixels",
        ),
        "out": (
            "out",
            "text",
            "null",
            "folder to write check.html to, a page of pictures; else nothing is written",
        ),
    },
    "val": {
        "weights": ("weights", "text", "required", "what to score: a weights file or a run"),
        "batch": ("batch", "integer", "as trained", "images per forward pass, over all processes"),
        "imgsz": ("imgsz", "integer", "as trained", "side of the square input, pixels"),
        "precision": (
            "precision",
            "auto|fp64|fp32|bf16|fp16",
            "as trained",
            "auto where this device is slow at the run's, or there is no run",
        ),
        "name": ("name", "text", "val", "name of the run folder, numbered when taken"),
        "data.source": ("data.source", "text", "as trained", "data set, as for train"),
        "split": ("split", "train|val|test", "val", "which split to score"),
    },
    "compare": {
        "strategies": (
            "strategies",
            "MODE[:KEY=VALUE+KEY=VALUE],...",
            "required",
            "modes to train in, each with keys of its own, lists as stages=up4+head;\n"
            "in YAML also {kind: MODE, KEY: VALUE}\n"
            + meanings(sections(annotation_of(Run, "strategy"))),
        ),
        "runs": (
            "runs",
            "[{KEY: VALUE, ...}, ...]",
            "[]",
            "in YAML: more runs, each with any keys of its own, and a name if wanted",
        ),
        "budget": (
            "budget",
            "samples|epochs|seconds",
            "samples",
            "what every run gets as much of as the control; seconds: `time` hours, or what that\n"
            "took, each run with the epochs that fit by the pace of one",
        ),
        "batch": ("batch", "integer", "16", "images per optimizer step, over all processes"),
        "out": ("out", "text", "project/task/name", "folder of all runs, each in one of its own"),
        "resume": ("resume", "true|false", "false", "go on with the comparison in `out`"),
    },
}


def type_name(annotation: Any) -> str:
    """Write a type for people: `a|b` for choices."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return "|".join(type_name(part) for part in parts if part is not type(None))
    if origin is Annotated:
        return type_name(parts[0])
    if origin is list:
        return f"[{type_name(parts[0])}, ...]"
    return {"str": "text", "bool": "true|false", "float": "number", "int": "integer"}.get(
        annotation.__name__, annotation.__name__
    )


def used(key: str, uses: Collection[str] | None) -> bool:
    """Tell whether a verb that uses these keys and sections takes this key."""
    return uses is None or any(f"{key}.".startswith(f"{prefix}.") for prefix in uses)


def rows(
    root: type[Section], uses: Collection[str] | None = None, modes: Collection[str] = ()
) -> list[Row]:
    """List (key, type, default, meaning) of all keys that take a plain value, short ones first.

    Args:
        root: the config.
        uses: keys and sections that a verb takes; None for all.
        modes: of training, if it takes but some.
    """
    found = []
    for key in sorted(all_keys(root), key=lambda key: "." in key):
        if sections(annotation_of(root, key)) or not used(key, uses):
            continue
        if Own in options(annotation_of(root, key)):
            continue  # nothing to type: passed in Python
        field, kinds = field_of(root, key)
        if modes and key.startswith("strategy."):
            kinds = [k for k in kinds if kind_of(k) in modes]
            if not kinds:
                continue
        if key.endswith(".kind"):
            kinds = [k for k in kinds if kind_of(k) != KIND]  # an object cannot be typed
            kinds_of = "|".join(str(kind_of(k)) for k in kinds)
            default = getattr(default_of(root, key), "kind", kind_of(kinds[0]))
            kind = kinds_of if len(kinds) > 1 else type_name(field.annotation)
            found.append((key, kind, str(default), field.description or meanings(kinds)))
            continue
        own = [k.model_fields[key.rpartition(".")[2]] for k in kinds]
        names = [str(kind_of(k)) for k in kinds]
        default = differing([text_of(one.default) for one in own], names, "; ")
        if key in ("imgsz", "batch") and issubclass(root, Run):
            default += f"; classify: {CLASSIFYING[key]}"
        meaning = differing([str(one.description) for one in own], names, "\n")
        found.append((key, type_name(field.annotation), default, meaning))
    return found


def differing(texts: Sequence[str], kinds: Sequence[str], between: str) -> str:
    """Write what holds for the first of some kinds, and what for those where it is another."""
    others: dict[str, list[str]] = {}
    for text, kind in zip(texts, kinds, strict=True):
        if text != texts[0]:
            others.setdefault(text, []).append(kind)
    return between.join([texts[0], *(f"{', '.join(of)}: {text}" for text, of in others.items())])


def text_of(default: Any) -> str:
    """Write a default as it would be typed."""
    if default is PydanticUndefined:
        return "required"
    return default if isinstance(default, str) else json.dumps(default)


def field_of(root: type[Section], key: str) -> tuple[Any, list[type[Section]]]:
    """Return a key's field and the sections of its level that have it."""
    first, _, rest = key.partition(".")
    if not rest:
        return root.model_fields[first], [root]
    kinds = [s for s in sections(root.model_fields[first].annotation) if annotation_of(s, rest)]
    return field_of(kinds[0], rest)[0], kinds


def default_of(root: type[Section], key: str) -> Any:
    """Return the default section that holds a key."""
    return root.model_fields[key.split(".", maxsplit=1)[0]].default


def page(verb: str) -> str:
    """Write the help page of a verb."""
    lines = [f"visiontrain {verb}: {VERBS[verb]}", "", "Examples:"]
    lines += [f"  {example}" for example in EXAMPLES[verb]]
    lines += ["", NOTES[verb]] if verb in NOTES else []
    if verb == "federated":
        for what, root in CONFIGS.items():
            lines += ["", f"Keys of `federated {what}`, type, default:"]
            lines += key_lines(rows(root, FEDERATED_USES.get(what)), ())
        return "\n".join(lines) + "\n"
    uses = TYPED.get(verb)
    own = OWN.get(verb, {})
    found = [own.get(row[0], row) for row in rows(ROOTS[verb], uses, MODES.get(verb, ()))]
    shared: list[Row] = []
    if verb in LIKE_TRAIN:  # its own would be lost among train's
        listed = rows(ROOTS["train"], TYPED.get("train"))
        shared, found = [r for r in found if r in listed], [r for r in found if r not in listed]
    if found:
        lines += ["", "Keys (key=value or --key value), type, default:"]
        lines += key_lines(found, {"compare": COMPARED, "plan": PLANNED}.get(verb, ()))
    if shared:
        names = ", ".join(dict.fromkeys(key.partition(".")[0] for key, *_ in shared))
        how = "as `visiontrain train --help` lists them, with short names and presets"
        text = f"{'And' if found else 'Keys'} {how}: {names}"
        lines += ["", *textwrap.wrap(text, 100)]
    if issubclass(ROOTS[verb], Run) and not shared:
        lines += ["", "Short names:"]
        lines += [
            f"  {alias:24} {main_name(key)}"
            for alias, (key, _) in ALIASES.items()
            if used(key, uses)
        ]
    if verb in TRY:
        lines += ["", "Presets are YAML files of the same keys: visiontrain " + TRY[verb]]
        of = [name for name in presets(TOP / "cfg") if name.startswith("compare/") is bool(shared)]
        lines += [f"  {name}" for name in of]
    return "\n".join(lines) + "\n"


def key_lines(found: Sequence[Row], first: Sequence[str]) -> list[str]:
    """Write keys with their types, defaults and meanings, those in `first` before the others."""
    lines, section = [], ""
    order = {name: number for number, name in enumerate(first)}
    for key, kind, default, meaning in sorted(
        found, key=lambda row: (order.get(row[0], len(order)), place(row))
    ):
        if "." in main_name(key) and section != key.partition(".")[0]:
            section = key.partition(".")[0]
            lines.append("")
        shown = textwrap.wrap(f"{kind.replace('|', '| ')} [{default}]", WIDTH)
        names = [main_name(key), *[""] * (len(shown) - 1)]
        lines += [
            f"  {name:24} {part.replace('| ', '|')}"
            for name, part in zip(names, shown, strict=True)
        ]
        lines += [f"  {'':24} {line}" for line in meaning.splitlines()]
    return lines


def main_name(key: str) -> str:
    """Write a section's main key as people type it: `data`, not `data.source`."""
    section, _, name = key.partition(".")
    return section if name == MAIN_FIELD.get(section, "kind") else key


def place(row: Row) -> tuple[int, str]:
    """Sort: sections' main keys, then keys of no section, then section by section."""
    key = row[0]
    if "." not in key:
        return 1, ""
    return (0, "") if main_name(key) != key else (2, key.partition(".")[0])


def overview() -> str:
    """Write the page of `visiontrain --help`."""
    lines = ["visiontrain VERB [PRESET] [key=value ...]", "", "Verbs:"]
    lines += [f"  {verb:10} {meaning}" for verb, meaning in VERBS.items()]
    lines += [
        "",
        "visiontrain VERB --help lists a verb's keys; visiontrain --version the version.",
        "Exit codes: 0 complete; 2 usage or config; 3 data; 4 out of memory; 5 diverged;",
        "74 disk full; 75 saved after SIGTERM or SIGUSR1, requeue; 130 saved after Ctrl-C;",
        "128 + signal not saved; 1 failed otherwise.",
    ]
    return "\n".join(lines) + "\n"


def reference() -> str:
    """Write cfg/README.md: presets, and every key of a run."""
    lines = [
        "# Presets and keys",
        "",
        "Presets are YAML files of the keys below: `visiontrain train detect/bccd epochs=10`.",
        "A preset may extend another with `extends: other.yaml`; what is typed wins over presets,",
        "presets over what a data set recommends. Generated by `python tools/make_docs.py`.",
        "",
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    cells = ([cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows(Run))
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    lines += ["", "Short names that YOLO users type:", "", "| name | key |", "|---|---|"]
    lines += [f"| {alias} | {key} |" for alias, (key, _) in ALIASES.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the files, or with --check compare them."""
    files = {PAGES / f"{verb}.txt": page(verb) for verb in VERBS}
    files |= {PAGES / "visiontrain.txt": overview(), TOP / "cfg" / "README.md": reference()}
    stale = [
        path
        for path, text in files.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(TOP)}: not current; run python tools/make_docs.py")
        return 1 if stale else 0
    PAGES.mkdir(exist_ok=True)
    for path in stale:
        path.write_text(files[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
