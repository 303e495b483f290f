"""The command line: `visiontrain VERB [PRESET] [key=value ...]`."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

VERBS = {
    "train": "train a detector or classifier; without arguments, on digits that ship with it",
    "val": "score weights on a split of a data set",
    "predict": "find objects in pictures and videos, or classify pictures",
    "check": "read a data set: what is wrong with it, what it has twice, what would help",
    "data": "write a data set as tars, for what outgrows a folder: data shard",
    "parity": "measure whether a training mode equals one device on your configuration",
    "federated": "clients on machines of their own: cert, key, register, server, client",
    "plan": "what a training needs in each mode: memory per device, waiting, bytes that travel",
    "compare": "train in several modes from the same weights and see what each gives and costs",
}
NOT_EXACT, USAGE_ERROR, DATA_ERROR = 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code, with errors as one line on stderr."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from visiontrain import __version__  # noqa: PLC0415

        print(__version__)
        return 0
    if not words or words[0] in {"help", "-h", "--help"} or {"-h", "--help"} & set(words):
        print(_help(next((word for word in words if word in VERBS), None)), end="")
        return 0
    verb, *rest = words
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"did you mean {close[0]}?" if close else f"take one of {', '.join(VERBS)}"
        return _complain(f"{verb}: no such verb; {meant}", USAGE_ERROR)
    return _run(RUN[verb], rest)


def _help(verb: str | None) -> str:
    """Return a page that was generated from the config: importing that would take a second."""
    name = f"{verb or 'visiontrain'}.txt"
    return (Path(__file__).parent / "help" / name).read_text(encoding="utf-8")


def _complain(text: str, code: int) -> int:
    sys.stderr.write(f"visiontrain: {text}\n")  # at once: other processes may share the pipe
    return code


def _run(verb: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    from visiontrain.core.errors import VisiontrainError  # noqa: PLC0415

    try:
        return verb(words)
    except VisiontrainError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; what was written before stays", 130)


# Each verb imports what it needs when it runs: a typo is told without waiting for torch.


def _train(words: Sequence[str]) -> int:
    return _start("train", words)


def _val(words: Sequence[str]) -> int:
    return _start("val", words)


def _start(verb: str, words: Sequence[str]) -> int:
    """Train or score, in as many processes as asked for, or as one of those that were started."""
    from visiontrain.strategies.environment import launched, wants_torchrun  # noqa: PLC0415

    if wants_torchrun():
        _load_run(verb, words)  # a typo is told here, not by each process
        again = ["-m", "torch.distributed.run", "-m", "visiontrain", verb, *words]
        os.execv(sys.executable, [sys.executable, *again])  # noqa: S606
    # Under a launcher only rank 0 reads the config: others may not see the folder it goes on in.
    told = launched()
    run = _load_run(verb, words) if told is None else lambda: _load_run(verb, words)
    from visiontrain import commands  # noqa: PLC0415

    return (commands.train if verb == "train" else commands.validate)(run)[1]


def _predict(words: Sequence[str]) -> int:
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415
    from visiontrain.predict_config import PredictConfig  # noqa: PLC0415

    config = load(PredictConfig, words, shipped("cfg"))
    from visiontrain.commands import predict  # noqa: PLC0415

    return predict(config, print).exit_code


def _check(words: Sequence[str]) -> int:
    as_json = "--json" in words
    run = _load_run("check", [word for word in words if word != "--json"])
    import json  # noqa: PLC0415

    from visiontrain.core.errors import ConfigError  # noqa: PLC0415
    from visiontrain.data.check import check  # noqa: PLC0415
    from visiontrain.data.open import open_dataset  # noqa: PLC0415

    task = run.task.kind if "task" in run.model_fields_set else None
    spec = open_dataset(run.data, task)
    typed = [word.lstrip("-").partition("=")[0] for word in words]
    if spec.task == "classify" and "imgsz" in typed:  # of a preset it says nothing, either
        raise ConfigError(f"imgsz: {run.imgsz}; of whole images no box is small, leave it out")
    advised = spec.defaults.get("imgsz", run.imgsz)
    imgsz = run.imgsz if "imgsz" in run.model_fields_set else advised
    report = check(spec, list(spec.splits), imgsz=imgsz)
    text = json.dumps(report.as_json(), indent=2) if as_json else "\n".join(report.lines())
    print(text)
    if run.out is not None:
        from visiontrain.engine.run_folder import home  # noqa: PLC0415
        from visiontrain.report.check_page import write_check  # noqa: PLC0415

        page = write_check(report, home(run.out))
        sys.stderr.write(f"pictures: {page}\n")  # stdout may be JSON
    return DATA_ERROR if report.failed else 0


def _data(words: Sequence[str]) -> int:
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.errors import ConfigError  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415
    from visiontrain.data.config import SHARDING_USES, ShardingConfig  # noqa: PLC0415

    if words[:1] != ["shard"]:
        raise ConfigError(f"data: {' '.join(words[:1]) or 'nothing'}; write data shard KEY=VALUE")
    config = load(ShardingConfig, words[1:], shipped("cfg"), SHARDING_USES)
    from visiontrain.data.sharding import shard  # noqa: PLC0415

    print("\n".join(shard(config).lines()))
    return 0


def _federated(words: Sequence[str]) -> int:
    from visiontrain.core.errors import ConfigError  # noqa: PLC0415
    from visiontrain.federated_config import CONFIGS, SERVE, USES  # noqa: PLC0415

    what, rest = next(iter(words), "nothing"), words[1:]
    if what == "server":
        return _serve(["strategy=federated", *rest], SERVE)
    if what not in CONFIGS:
        raise ConfigError(f"federated: {what}; write one of server, {', '.join(CONFIGS)}")
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415

    config = load(CONFIGS[what], rest, shipped("cfg"), USES.get(what))
    from visiontrain.federated_commands import federated  # noqa: PLC0415

    return federated(config, partial(print, flush=True))


def _serve(words: Sequence[str], default: str) -> int:
    """Train as a server, at an address that a YAML or the run that goes on may know."""
    from visiontrain.engine.run_folder import RunFolder, home  # noqa: PLC0415

    run = _load_run("train", words)
    goes_on = run.resume and run.out and RunFolder(home(run.out)).config.is_file()
    if not goes_on and getattr(run.strategy, "serve", None) is None:
        words = [*words, f"strategy.serve={default}"]
    return _train(words)


def _parity(words: Sequence[str]) -> int:
    run = _load_run("parity", words)
    from visiontrain.commands import parity  # noqa: PLC0415

    report = parity(run)
    for row in report.rows():
        print(f"{row[0]:5} {row[1]:46} {row[2]:>8} {row[3]:>8}  {row[4]}")
    steps = f" over {report.steps} steps"
    print(f"{report.mode}: {report.verdict}{steps}{_reasons(report.reasons)}")
    return 0 if report.verdict == "exact" else NOT_EXACT


def _compare(words: Sequence[str]) -> int:
    from visiontrain.compare_config import USES, CompareConfig  # noqa: PLC0415
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415

    config = load(CompareConfig, words, shipped("cfg"), USES, _below_comparison)
    from visiontrain.comparison import compare  # noqa: PLC0415

    comparison = compare(config, _lasting)  # runs print from other processes
    print(comparison)
    return comparison.exit_code


def _lasting(line: str) -> None:
    """Print a line, for as long as somebody reads: what is under way goes on without."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        from visiontrain.loggers.registry import lose_stdout  # noqa: PLC0415

        lose_stdout()


def _plan(words: Sequence[str]) -> int:
    as_json = "--json" in words
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415
    from visiontrain.plan_config import USES, PlanConfig  # noqa: PLC0415

    typed = [word for word in words if word != "--json"]
    config = load(PlanConfig, typed, shipped("cfg"), USES, _below)
    import json  # noqa: PLC0415

    from visiontrain.planning import plan  # noqa: PLC0415

    found = plan(config)
    print(json.dumps(found.as_json(), indent=2) if as_json else found)
    return 0


def _reasons(reasons: Sequence[str]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""


def _load_run(verb: str, words: Sequence[str]):  # noqa: ANN202 - importing Run for the type takes a second
    from visiontrain.core.config import load  # noqa: PLC0415
    from visiontrain.core.shipped import shipped  # noqa: PLC0415
    from visiontrain.recipe import USES, Run  # noqa: PLC0415

    return load(Run, words, shipped("cfg"), USES[verb], BELOW.get(verb))


def _below(tree: dict[str, Any]) -> Mapping[str, Any]:
    from visiontrain.prepare import below  # noqa: PLC0415

    return below(tree)


def _below_validation(tree: dict[str, Any]) -> Mapping[str, Any]:
    from visiontrain.scoring import below_validation  # noqa: PLC0415

    return below_validation(tree)


def _below_comparison(tree: dict[str, Any]) -> Mapping[str, Any]:
    from visiontrain.comparison import below  # noqa: PLC0415

    return below(tree)


# What is typed lies on an older run, the data set's advice, or what weights say.
BELOW: Mapping[str, Callable[[dict[str, Any]], Mapping[str, Any]]] = {
    "train": _below,
    "parity": _below,
    "val": _below_validation,
}
RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "val": _val,
    "predict": _predict,
    "check": _check,
    "data": _data,
    "parity": _parity,
    "federated": _federated,
    "plan": _plan,
    "compare": _compare,
}
