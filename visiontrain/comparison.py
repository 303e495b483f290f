"""The compare verb: the same training in several modes, one after another, and what each gives."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visiontrain import __version__
from visiontrain.compare_config import CompareConfig, Mode, modes, run_of, seeds, shared_keys
from visiontrain.core.config import build, merge
from visiontrain.core.durable import replace_file, storing
from visiontrain.core.errors import ConfigError
from visiontrain.core.explain import short
from visiontrain.core.own import objects_of, with_objects
from visiontrain.core.yaml_loader import dump_yaml, load_yaml
from visiontrain.data.open import open_dataset
from visiontrain.engine.run_folder import RunFolder, claim, home
from visiontrain.engine.signals import Halt, halting
from visiontrain.extrapolation import Scale, extrapolate, scale_of
from visiontrain.looking import look
from visiontrain.prepare import below as below_a_run
from visiontrain.prepare import goes_on, settled
from visiontrain.recipe import Run, foreign
from visiontrain.report.compare import Comparison
from visiontrain.report.compare_page import write_page
from visiontrain.report.extrapolated import Extrapolation
from visiontrain.report.related import related
from visiontrain.report.rows import Row
from visiontrain.series import Entry, Job, Say, Series
from visiontrain.start import initial_sha256
from visiontrain.strategies.config import Client, Single
from visiontrain.strategies.devices import devices
from visiontrain.strategies.environment import cores, launched
from visiontrain.strategies.federated.config import Federated, takers

ASKED = "compare.yaml"  # in the folder: what was asked for
FAILED = 1  # exit code
STARTLESS = {"optim", "save", "log", "epochs", "batch", "accumulate", "device", "precision"}

Tree = dict[str, Any]


def compare(config: CompareConfig, say: Say) -> Comparison:
    """Train in every mode of a list, from the same weights and with the same samples.

    Each run lies in a folder of its own and goes on, or is taken as it is, with `resume`. A mode
    that fails is a row with its error.

    Raises:
        VisiontrainError: before anything starts, when one of the runs cannot be what was asked.
    """
    if launched() is not None:
        raise ConfigError(
            "compare: under torchrun; start it without, its runs start their own processes"
        )
    asked, config = _asked_for(config)
    scale = scale_of(config)
    entries = planned(config)
    if scale is not None and foreign(entries[0].jobs[0].run):
        model = entries[0].jobs[0].run.model.kind
        raise ConfigError(f"links: {model} is one block, of which nothing is known; leave it out")
    for line in _left_out(asked):
        say(line)
    starts = {job.start for entry in entries for job in entry.jobs}
    start = f"of all: sha256 {min(starts)}" if len(starts) == 1 else "differ by seed or by run"
    folder = _folder(config, entries[0].jobs[0].run.task.kind)
    say(f"initial weights {start}; results go to {folder.path}")
    with (
        folder.held(),
        halting() as stopped,
        tempfile.TemporaryDirectory(prefix="visiontrain-") as controls,
    ):
        series = Series(config, folder, Path(controls), stopped, say)
        series.refuse_changed(entries)
        _write_asked(folder, asked)
        return run_all(series, entries, scale)


def below(given: Tree) -> Mapping[str, Any]:
    """Return what the keys that were given for a comparison lie on.

    The comparison that goes on, and what its data set recommends.

    Raises:
        VisiontrainError: when the folder or the data cannot be used.
    """
    base = _read_asked(given.get("out")) if goes_on(given, ASKED) else {}
    whole = merge(CompareConfig, base, given) | {"resume": False}
    return merge(CompareConfig, below_a_run(whole), base)


# -- before anything starts -----------------------------------------------------------


def _asked_for(config: CompareConfig) -> tuple[Tree, CompareConfig]:
    """Put what is asked now on the comparison that goes on; return it as given, and checked."""
    given = config.model_dump(mode="json", exclude_unset=True) | {"strategy": shared_keys(config)}
    given["resume"] = goes_on(given, ASKED)
    if given["resume"]:
        given = merge(CompareConfig, _read_asked(config.out), given)
    config = with_objects(build(CompareConfig, given), objects_of(config))
    if config.batch < 0:
        raise ConfigError(
            f"batch: {config.batch}; what fits differs from mode to mode, take a number"
        )
    return given, config


def _left_out(asked: Tree) -> Iterator[str]:
    """Say what a comparison that goes on had, and is not asked to show again."""
    before = _read_asked(asked.get("out")) if asked["resume"] else {}
    for key in ("strategies", "runs", "seeds"):
        left = [one for one in before.get(key) or [] if one not in (asked.get(key) or [])]
        if left:
            yield (
                f"{key}: without {', '.join(short(str(one)) for one in left)}, which the "
                "comparison had; its runs stay, and are shown where they are named again"
            )


def _read_asked(out: Any) -> Tree:
    if out is None:
        raise ConfigError("resume: true without a folder; add out=DIR, the comparison's")
    path = home(str(out)) / ASKED
    if not path.is_file():
        raise ConfigError(f"out: {out} holds no {ASKED}; leave resume away to start there")
    tree = load_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: no config; give the folder of a comparison")
    return tree


def _write_asked(folder: RunFolder, asked: Tree) -> None:
    path = folder.path / ASKED
    tree = {key: value for key, value in asked.items() if key not in {"out", "resume"}}
    head = (
        f"# visiontrain {__version__}: `visiontrain compare` this file to repeat the comparison\n"
    )
    with storing(path):
        replace_file(path, (head + dump_yaml(tree)).encode())


def planned(config: CompareConfig) -> list[Entry]:
    """Return every run as it would start here, so that what cannot be is told at once.

    Raises:
        VisiontrainError: one of them cannot be what was asked, or is another one again.
    """
    chosen = modes(config)
    control = _first(config, chosen)
    _refuse_lengths(config, chosen)
    starts: dict[str, str] = {}
    entries: list[Entry] = []
    for mode in chosen:
        beside = next((e for e in entries if e.mode.name == mode.beside), None)
        like = control if beside is None else beside.jobs[0].run
        entry = _entry(config, mode, like, starts)
        if beside is not None:
            known = next((e for e in entries if _same_rivals(e, entry)), entry)
            entries[entries.index(beside)] = replace(beside, alone=known.mode.name)
            if known is not entry:
                continue
        entries.append(entry)
    runs = [job.run for entry in entries for job in entry.jobs]
    names = [job.name for entry in entries for job in entry.jobs]
    for number, run in enumerate(runs):
        same = runs.index(run)
        if same < number:
            raise ConfigError(f"strategies: {names[number]} is {names[same]} again; leave it out")
    return entries


def _same_rivals(one: Entry, other: Entry) -> bool:
    """Tell whether two rows would show the best of the same clients, trained as long."""
    runs = [[job.run for job in entry.jobs] for entry in (one, other)]
    return bool(one.mode.rivals) and runs[0] == runs[1]


def _refuse_lengths(config: CompareConfig, chosen: Sequence[Mode]) -> None:
    """Refuse lengths of single runs where a time is shared out.

    Raises:
        ConfigError: naming the run.
    """
    control = _control(chosen)
    for mode in chosen if config.budget == "seconds" else ():
        keys = [key for key in ("time", "epochs") if key in mode.keys]
        keys += ["strategy.rounds"] if "rounds" in mode.strategy.model_fields_set else []
        if keys and (mode is not control or config.time is not None or keys[0] == "time"):
            key = keys[0]
            raise ConfigError(
                f"{key}: of {mode.name}, with budget=seconds, where each run has as many as fit "
                "into the time; leave it out"
            )


def _control(chosen: Sequence[Mode]) -> Mode:
    return next((mode for mode in chosen if mode.strategy.kind == "single"), chosen[0])


def _first(config: CompareConfig, chosen: Sequence[Mode]) -> Run:
    """Return the run that others are given as much as."""
    mode = _control(chosen)
    return settled(run_of(config, mode, _changes(config, mode, seeds(config)[0])))


def _entry(config: CompareConfig, mode: Mode, control: Run, starts: dict[str, str]) -> Entry:
    """Return a row that is to be; `control` is what it is given as much as."""
    every = seeds(config)
    jobs = []
    for member in mode.members():
        for seed in every:
            changes = _changes(config, member, seed)
            run = settled(run_of(config, member, changes))
            epochs = _epochs(config, member, run, control)
            if epochs != run.epochs:
                changes |= {"epochs": epochs}
                run = settled(run_of(config, member, changes))
            name = member.name if len(every) == 1 else f"{member.name}-seed={seed}"
            jobs.append(Job(member, name, changes, run, _start(run, starts)))
    return Entry(mode, jobs)


def _changes(config: CompareConfig, mode: Mode, seed: int) -> Tree:
    changes: Tree = {"seed": seed}
    device = mode.keys.get("device", config.device)
    if mode.strategy.kind == "placement" and devices(device) == [torch.device("cpu")]:
        changes["device"] = "cpu,cpu"  # whose parts take turns there
    return changes


def _epochs(config: CompareConfig, mode: Mode, run: Run, control: Run) -> int:
    """Return how long a run is to be: under budget=samples, for as many images as the control.

    Clients alone train as long as in the federated run beside them: rounds x local_epochs.
    """
    if mode.beside:
        return control.epochs
    own = "epochs" in mode.keys or "rounds" in mode.strategy.model_fields_set
    if config.budget != "samples" or own or isinstance(run.strategy, Client):
        return run.epochs
    if run.data == control.data and _share(run) == 1 and run.epochs == control.epochs:
        return run.epochs
    unit = getattr(run.strategy, "local_epochs", 1)
    wanted = control.epochs * _images(control) / (_images(run) * _share(run))
    return unit * max(1, round(wanted / unit))


def _share(run: Run) -> float:
    """Return the share of the images that an epoch has: of some clients, or all."""
    mode = run.strategy
    return takers(mode) / mode.clients if isinstance(mode, Federated) else 1.0


def _images(run: Run) -> int:
    spec = open_dataset(run.data, run.task.kind)
    return len(spec.cut(spec.read("train")))  # without decoding images


def _start(run: Run, starts: dict[str, str]) -> str:
    """Return the sha256 of what a run begins with; runs of one model and seed share it."""
    key = run.model_copy(update={"strategy": Single()}).model_dump_json(exclude=STARTLESS)
    if key not in starts:
        starts[key] = initial_sha256(run)
    return starts[key]


def _folder(config: CompareConfig, task: str) -> RunFolder:
    if config.resume:
        return RunFolder(home(config.out or "."))
    parent = home(config.project) / task
    return claim(config.out, parent, config.name, resumable=True)


# -- one after another ------------------------------------------------------------------


def run_all(series: Series, entries: Sequence[Entry], scale: Scale | None = None) -> Comparison:
    """Train and measure what is not done yet; write table and page after each row.

    Args:
        series: of runs.
        entries: the rows to be.
        scale: on what speeds are predicted in the end, from the control run's.
    """
    rows: list[Row] = []
    first = next((e for e in entries if e.mode.strategy.kind == "single"), entries[0])
    timed, hours = series.config.budget == "seconds", series.config.time
    seconds = hours * 3600 if timed and hours else None
    # What the others get may hang on it, and a process has most memory to itself at first.
    todo = sorted(entries, key=lambda e: e is not first)
    code, predicted = 0, None
    found = result(series, rows, entries, code)
    try:
        for number, entry in enumerate(todo, 1):
            series.say(f"{number} of {len(entries)}: {entry.mode.name}")
            rows.append(series.row(entry, control=entry is first, seconds=seconds))
            if timed and entry is first:  # of one seed: others may come later
                seconds = seconds or next((t.seconds for t in rows[0].trials if t.seconds), None)
            code = FAILED if any(row.error for row in rows) else 0
            found = result(series, rows, entries, code)
            found.write()
            write_page(found)  # without pictures, so that it never is older than the table
            if timed and seconds is None:
                series.say(f"budget: {entry.mode.name} failed, so nobody knows how long others get")
                break
        control = next(row for row in rows if row.name == first.mode.name)
        predicted = _predicted(series, first, control, scale)
        found = replace(found, predicted=predicted)
        found.write()
        write_page(found, look(entries[0].jobs[0].run, series.folder, found.rows))
    except Halt as halt:
        return replace(result(series, rows, entries, halt.exit_code), predicted=predicted)
    return found


def _predicted(series: Series, entry: Entry, row: Row, scale: Scale | None) -> Extrapolation | None:
    """Predict speeds of devices that each take the control's batch, at the pace it had.

    What cannot be measured for it costs a line: the comparison is complete without it.
    """
    if scale is None:
        return None
    if not row.images_per_s:
        series.say(f"links: {row.name} has no speed, so nothing can be predicted")
        return None
    run = entry.jobs[0].run
    pace = run.batch / row.images_per_s if isinstance(run.strategy, Single) else None
    alone = run.model_copy(update={"strategy": Single()})
    source = f"that of {row.name}"
    there = replace(scale, gloo=devices(run.device)[0].type == "cpu")
    made = series.attempt("links", lambda: extrapolate(alone, 1, there, None, pace, source))
    return None if isinstance(made, str) else made


def result(series: Series, rows: Sequence[Row], entries: Sequence[Entry], code: int) -> Comparison:
    """Put rows together with where they were made."""
    shared = entries[0].jobs[0].run
    device = devices(shared.device)[0]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    system = f"{platform.system()} {platform.machine()}"
    order = [entry.mode.name for entry in entries]
    several = getattr(shared.task, "several", False)
    return Comparison(
        folder=series.folder.path,
        rows=related(
            sorted(rows, key=lambda row: order.index(row.name)), cores=device.type == "cpu"
        ),
        planned=len(entries),
        task="several" if several else shared.task.kind,
        initial_sha256=entries[0].jobs[0].start,
        machine={"cores": cores(), "device": name, "system": system},
        versions={
            "visiontrain": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        exit_code=code,
        title=f"{shared.model.kind} on {shared.data.source}",
        budget=series.config.budget,
    )
