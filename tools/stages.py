#!/usr/bin/env python3
"""Measure pipelines on this machine, one thread per process: a JSON line per figure.

    tools/stages.py cuts   [key=value ...]    every cut in two, then `auto` against the best
    tools/stages.py bubble [key=value ...]    how long processes wait, by number of micro-batches
    tools/stages.py speed  [key=value ...]    two processes, one, and one with placed blocks

Keys are those of `visiontrain train`. Every step trains on the same batch, which is there already.
`cuts` takes one step of each cut in turn, some rounds, and ranks them by medians; then `auto` and
the best alternate in pairs. `bubble` keeps the images of a micro-batch and counts the time that the
threads of the schedule do not compute. `speed` alternates between kinds, a start for each turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist  # noqa: TID251 - a barrier before each step

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from visiontrain import app  # noqa: E402
from visiontrain.core.config import load  # noqa: E402
from visiontrain.core.memory import kept_memory  # noqa: E402
from visiontrain.core.own import NONE, Objects  # noqa: E402
from visiontrain.core.shipped import shipped  # noqa: E402
from visiontrain.core.types import Place  # noqa: E402
from visiontrain.engine.step import train_step  # noqa: E402
from visiontrain.prepare import below  # noqa: E402
from visiontrain.recipe import Run  # noqa: E402
from visiontrain.run_checks import check_values  # noqa: E402
from visiontrain.staging import facts_of_blocks, with_stages  # noqa: E402
from visiontrain.strategies import launch  # noqa: E402
from visiontrain.strategies.devices import settle  # noqa: E402

ROUNDS, PAIRS, TURNS = 5, 10, 5
WARM, STEPS = 2, 5
MICRO = (2, 4, 8, 16)
TWO = ("strategy=pipeline", "strategy.processes=2", "strategy.threads=1")


@dataclass
class Clock:
    """Times of one process's steps, and of its share of the schedule."""

    schedule: Any
    wall: float = 0.0
    busy: float = 0.0

    def __call__(self, *args: Any) -> Any:
        """Stand in for the strategy's `forward_backward`."""
        wall, busy = time.perf_counter(), time.thread_time()
        made = self.schedule(*args)
        self.wall, self.busy = time.perf_counter() - wall, time.thread_time() - busy
        return made


def made_of(words: Sequence[str], device: str = "cpu") -> Run:
    """Settle a run as `visiontrain train` would, with the mode's processes."""
    words = [*words, f"device={device}", "workers=0"]
    run = load(Run, words, shipped("cfg"), below=below)
    check_values(run)
    return run.model_copy(update={"strategy": settle(run.strategy, run.device)})


def steps(job_json: str, place: Place, objects: Objects = NONE) -> int:
    """Be one process: take the steps that a job lists, and write down how long each took."""
    job = json.loads(job_json)
    torch.set_num_threads(1)
    with kept_memory():
        learners, taken = [], []
        for text in job["runs"]:
            learner, source = app.build_traced(text, place, objects)
            clock = Clock(learner.strategy.forward_backward)
            learner.strategy.forward_backward = clock
            learners.append((learner, next(source), clock))
        for number in job["order"]:
            learner, step, clock = learners[number]
            if place.world > 1:
                dist.barrier()
            began = time.perf_counter()
            train_step(learner, step.micro_batches, step.images)
            whole = time.perf_counter() - began
            taken.append({"run": number, "step": whole, "wall": clock.wall, "busy": clock.busy})
    Path(job["folder"], f"{place.rank}.json").write_text(json.dumps(taken))
    return 0


def measure(runs: Sequence[Run], order: Sequence[int]) -> list[list[dict[str, float]]]:
    """Take steps of several runs of one mode in an order; return the figures of each process."""
    first = runs[0]
    entry = import_module("stages").steps
    with tempfile.TemporaryDirectory(prefix="stages-") as folder:
        texts = [run.model_dump_json() for run in runs]
        job = json.dumps({"runs": texts, "order": list(order), "folder": folder})
        device = "cpu,cpu" if first.strategy.kind == "placement" else first.device
        if launch.run(first.strategy, device, entry, job):
            sys.exit("stages: a process failed")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def medians(figures: list[list[dict[str, float]]], skip: int) -> dict[int, float]:
    """Return the median seconds of each run's steps, the slowest process's."""
    times: dict[int, list[float]] = {}
    for turn in zip(*figures, strict=True):
        times.setdefault(int(turn[0]["run"]), []).append(max(t["step"] for t in turn))
    return {number: statistics.median(each[skip:]) for number, each in times.items()}


def cuts(words: Sequence[str]) -> None:
    """Rank every cut in two, then compare the one that is chosen with the fastest."""
    base = made_of([*words, *TWO])
    chosen, lines = with_stages(base, asked=False)
    print("\n".join(lines), file=sys.stderr)
    names = [cost.name for cost in facts_of_blocks(base).costs][1:]
    staged = [with_cut(base, name) for name in names]
    order = [n for _ in range(WARM + ROUNDS) for n in range(len(staged))]
    times = medians(measure(staged, order), WARM)
    ranked = sorted(times, key=times.__getitem__)
    auto, best = names.index(chosen.strategy.stages[0]), ranked[0]
    ratios = [1.0]
    if auto != best:
        pairs = [n % 2 if n // 2 % 2 else 1 - n % 2 for n in range(2 * (WARM + PAIRS))]
        figures = measure([staged[auto], staged[best]], pairs)
        taken = [max(t["step"] for t in turn) for turn in zip(*figures, strict=True)][2 * WARM :]
        by = [(taken[n], taken[n + 1]) for n in range(0, 2 * PAIRS, 2)]
        turns = [pairs[2 * WARM + n] for n in range(0, 2 * PAIRS, 2)]
        ratios = [b / a if turn else a / b for (a, b), turn in zip(by, turns, strict=True)]
    say(
        figure="cuts",
        keys=list(words),
        cuts=len(names),
        auto=names[auto],
        place=ranked.index(auto) + 1,
        best=names[best],
        seconds={names[n]: round(times[n], 4) for n in ranked},
        ratio=round(statistics.median(ratios), 3),
        n=len(ratios),
    )


def with_cut(run: Run, name: str) -> Run:
    """Return a run whose second stage begins at a block."""
    strategy = run.strategy.model_copy(update={"stages": [name]})
    return run.model_copy(update={"strategy": strategy})


def bubble(words: Sequence[str]) -> None:
    """Compare how long processes wait with what equal stages would."""
    each = made_of([*words, *TWO]).batch // MICRO[0]
    run, lines = with_stages(made_of([*words, *TWO]), asked=False)
    print("\n".join(lines), file=sys.stderr)
    runs = [run.model_copy(update={"accumulate": m, "batch": m * each}) for m in MICRO]
    figures = measure(runs, [n for _ in range(WARM + STEPS) for n in range(len(runs))])
    for number, m in enumerate(MICRO):
        mine = [[t for t in process if t["run"] == number][WARM:] for process in figures]
        waits = [
            1 - sum(t["busy"] for t in turn) / (2 * max(t["wall"] for t in turn))
            for turn in zip(*mine, strict=True)
        ]
        say(
            figure="bubble",
            keys=list(words),
            schedule=run.strategy.schedule,
            micro_batches=m,
            equal_stages=round(1 / (m + 1), 3),
            waits=round(statistics.median(waits), 3),
            least=round(min(waits), 3),
            most=round(max(waits), 3),
            n=len(waits),
        )


def speed(words: Sequence[str]) -> None:
    """Compare the images per second of two processes with one's, whole and placed."""
    pipeline, _ = with_stages(made_of([*words, *TWO]), asked=False)
    cut = f"strategy.stages=[{','.join(pipeline.strategy.stages)}]"
    kinds = {
        "one": made_of([*words, "strategy=single"]),
        "one, in one pass": made_of([*words, "strategy=single", "accumulate=1"]),
        "placement": made_of([*words, "strategy=placement", cut], "cpu,cpu"),
        "pipeline": pipeline,
    }
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(TURNS):
        for kind in list(kinds)[:: -1 if turn % 2 else 1]:
            taken = medians(measure([kinds[kind]], [0] * (WARM + STEPS)), WARM)[0]
            rates[kind].append(kinds[kind].batch / taken)
    for kind, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates["one"], strict=True)]
        say(
            figure="speed",
            keys=list(words),
            kind=kind,
            images_per_s=round(statistics.median(values), 3),
            over_one=round(statistics.median(ratios), 3),
            n=len(values),
        )


def say(**figure: Any) -> None:
    """Print a line of JSON."""
    print(json.dumps(figure), flush=True)


def main() -> None:
    """Measure what is asked for."""
    figures = {"cuts": cuts, "bubble": bubble, "speed": speed}
    if len(sys.argv) < 2 or sys.argv[1] not in figures:
        sys.exit(f"stages: name one of {', '.join(figures)}")
    figures[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    import_module("stages").main()
