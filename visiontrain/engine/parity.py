"""Whether a mode trains exactly as one device does, on the user's own configuration.

Exact means, in fp64, where rounding cannot hide behind chaos: the same images with the same
pixels, the same assignments, weights within 1e-6. In fp32 the first gradient and the first terms
agree to 1e-4, and after N steps the weights are no farther off than twice what rounding alone
does on one device, when the same images are cut as the mode cuts them and permuted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visiontrain.core.errors import ConfigError, RankError
from visiontrain.core.own import Objects
from visiontrain.core.types import Place
from visiontrain.data.loader import Step
from visiontrain.engine.learner import Learner
from visiontrain.engine.trace import Trace, compare, exact_convolutions, permuted, record
from visiontrain.strategies import launch
from visiontrain.strategies.config import (
    DDP,
    SPARSE,
    Group,
    ParameterServer,
    Pipeline,
    Single,
    StrategyConfig,
)
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.precision import resolve

FEDERATED = "clients train apart for whole epochs, and only their weights meet"
ULPS = 2.0**-18  # 32 units of fp32's last place: the least that weights may differ
ALLOWED = {
    "fp64": {
        "samples": 0.0,
        "counts": 1e-9,
        "terms": 1e-6,
        "norms": 1e-6,
        "weights": 1e-6,
        "ema": 1e-6,
    },
    "fp32": {"samples": 0.0, "terms": 1e-4, "norms": 1e-4, "first": 1e-4},
    "bf16": {"samples": 0.0},
    "fp16": {"samples": 0.0},
}
MEANING = {
    "samples": "images that differ",
    "counts": "assignments, relative",
    "terms": "loss terms of steps 1-3, relative",
    "norms": "gradient norms of steps 1-3, relative",
    "first": "gradient of step 1, of each tensor's maximum",
    "last": "gradient of the last step, likewise",
    "weights": "weights after all steps",
    "ema": "averaged weights after all steps",
    "optimizer": "optimizer state, of each tensor's maximum",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One measured difference; `allowed` is None where it is only reported."""

    precision: str
    name: str  # a key of MEANING
    measured: float
    allowed: float | None

    @property
    def passed(self) -> bool:
        """Tell whether the difference is as small as it must be."""
        return self.allowed is None or self.measured <= self.allowed


@dataclass(frozen=True, slots=True)
class Report:
    """What `visiontrain parity` prints."""

    mode: str
    steps: int
    verdict: str  # exact, approximate or different algorithm
    reasons: Sequence[str]  # why not exact
    checks: Sequence[Check]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table: precision, what, measured, allowed, verdict."""
        return [
            (
                check.precision,
                MEANING[check.name],
                f"{check.measured:.1e}",
                "" if check.allowed is None else f"{check.allowed:.1e}",
                "" if check.allowed is None else ("ok" if check.passed else "over"),
            )
            for check in self.checks
        ]


@dataclass(frozen=True, slots=True)
class Job:
    """One training to be traced."""

    run: Mapping[str, Any]
    steps: int
    folder: str  # an existing one; the trace is written there
    permute: int | None = None  # seed of the order inside batches

    def to_json(self) -> str:
        """Return the text that a worker gets."""
        return json.dumps(asdict(self))


Parts = tuple[Learner, Iterable[Step]]
Build = Callable[
    [str, Place, Objects], Parts
]  # (run as JSON, place, objects) -> a fresh learner and its steps


def trace(job_json: str, place: Place, objects: Objects, build: Build) -> int:
    """Be a process of one traced training: the part of the worker that knows the engine."""
    job = Job(**json.loads(job_json))
    learner, steps = build(json.dumps(job.run), place, objects)
    if job.permute is not None:
        steps = permuted(steps, job.permute)
    with learner.strategy.running(), exact_convolutions():
        recorded = record(learner, steps, job.steps)
    if place.is_main:
        recorded.save(Path(job.folder))
    return 0


@dataclass(frozen=True, slots=True)
class Parity:
    """A comparison of the user's mode with one device.

    Args:
        run: the whole config, as JSON values.
        mode: its strategy section.
        entry: an importable function that calls `trace` with its own `build`.
        steps: optimizer steps to compare.
        seeds: how many permuted controls to make, at least and at most.
        precisions: what to train in, where not in fp64 and as configured.
        controls: a folder that keeps what one device did, for other modes of the same run.
        objects: the user's, that `run` names.
    """

    run: Mapping[str, Any]
    mode: StrategyConfig
    entry: launch.Entry
    steps: int = 20
    seeds: tuple[int, int] = (5, 20)
    precisions: Sequence[str] = ()
    controls: Path | None = None
    objects: Objects = field(default_factory=dict)

    def measure(self) -> Report:
        """Train with the mode and with one device, in each precision.

        Raises:
            ConfigError: the config asks for one device, or for more steps than it has.
            RankError: a process failed.
        """
        if isinstance(self.mode, Single):
            raise ConfigError(
                "strategy: single; parity compares another mode with it, take strategy=ddp"
            )
        if isinstance(self.mode, Federated):  # its steps are rounds: nothing to lay beside them
            return Report(self.mode.kind, 0, "different algorithm", (FEDERATED,), ())
        own = resolve(self.run["precision"], launch.devices(self.run["device"])[0])
        precisions = self.precisions or dict.fromkeys(("fp64", own))
        checks = [check for precision in precisions for check in self._checks(precision)]
        return judge(self.run, self.mode.kind, self.steps, checks)

    def _checks(self, precision: str) -> list[Check]:
        control = self._control(precision)
        gaps = compare(control, self._train(self._early(), {"precision": precision})).as_dict()
        allowed: dict[str, float] = dict(ALLOWED[precision])
        if precision != "fp64":
            allowed["weights"] = max(
                ULPS, 2 * self._rounding(control, precision, gaps["weights"] / 2)
            )
        return [Check(precision, name, gaps[name], allowed.get(name)) for name in MEANING]

    def _early(self) -> StrategyConfig:
        """Return the mode, doing in its first steps what else it would do in later ones only."""
        if isinstance(self.mode, DDP) and self.mode.compress in SPARSE:
            return self.mode.model_copy(update={"compress_after": 0.0})
        return self.mode

    def _control(self, precision: str) -> Trace:
        """Train with one device, or take what it did for another mode."""
        kept = self.controls and self.controls / precision
        if kept and kept.is_dir():
            return Trace.load(kept)
        control = self._train(Single(), {"precision": precision})
        if kept:
            kept.mkdir(parents=True)
            control.save(kept)
        return control

    def _rounding(self, control: Trace, precision: str, wanted: float) -> float:
        """Return how far order and cuts alone move the weights on one device: the most of all.

        One seed in seven or so moves them thirty times as far as the others, when rounding
        flips an assignment; so if the mode is farther off than the first few, more are asked.
        """
        cut = {"precision": precision, "accumulate": self._cells()}
        farthest, (least, most) = 0.0, self.seeds
        for seed in range(most):
            if seed >= least and farthest >= wanted:
                break
            other = self._train(Single(), cut, permute=seed)
            farthest = max(farthest, compare(control, other).weights)
        return farthest

    def _cells(self) -> int:
        """Count the parts that the mode cuts each batch into."""
        accumulate = int(self.run["accumulate"])
        mode = self.mode
        processes = mode.processes if isinstance(mode, Group | ParameterServer) else 1
        if isinstance(self.mode, Pipeline):
            copies = self.mode.data_parallel
            return max(accumulate, processes // copies) * copies
        return accumulate * processes

    def _train(
        self, mode: StrategyConfig, change: Mapping[str, Any], *, permute: int | None = None
    ) -> Trace:
        run = {**self.run, "strategy": mode.model_dump(), **change}
        with tempfile.TemporaryDirectory(prefix="visiontrain-") as folder:
            job = Job(run, self.steps, folder, permute)
            device, text = self.run["device"], job.to_json()
            code = launch.run(mode, device, self.entry, text, self.objects)
            if code:
                raise RankError(f"parity: {mode.kind} ended with exit code {code} before its time")
            return Trace.load(Path(folder))


def judge(run: Mapping[str, Any], mode: str, steps: int, checks: Sequence[Check]) -> Report:
    """Put a name to the differences."""
    missed = [check for check in checks if not check.passed]
    loose = run.get("strategy", {}).get("sync", "bsp") != "bsp"
    if not missed and not (loose and run["strategy"]["processes"] > 1):
        return Report(mode, steps, "exact", (), checks)
    if any(check.name == "samples" for check in missed):
        return Report(mode, steps, "different algorithm", ("it trains on other images",), checks)
    measured = [
        f"{check.precision}: {MEANING[check.name]} {check.measured:.1e}, over {check.allowed:.1e}"
        for check in missed
    ]
    return Report(mode, steps, "approximate", [*causes(run), *measured], checks)


def causes(run: Mapping[str, Any]) -> list[str]:
    """Name the settings under which a batch that is cut is not the same batch."""
    norm, found = run["model"].get("norm"), []
    if norm in ("batch", "sync"):
        cut = "micro-batch" if norm == "sync" else "process and micro-batch"
        found.append(
            f"model.norm={norm}: each {cut} normalises over its own images; model.norm=group "
            "would show whether anything else differs"
        )
    mode = run.get("strategy", {})
    plain_values = {"aggregate": "mean", "compress": "none", "sync_every": 1, "sync": "bsp"}
    for key, plain in plain_values.items():
        if mode.get(key, plain) != plain:
            found.append(f"strategy.{key}={mode[key]}: not the sum of all gradients at every step")
    if run.get("strategy", {}).get("reduce") == "bf16":
        found.append("strategy.reduce=bf16: gradients are rounded before they are summed")
    if run["model"].get("kind") == "faster_rcnn":
        found.append(
            "model=faster_rcnn: each process and micro-batch draws its own anchors and proposals"
        )
    return found
