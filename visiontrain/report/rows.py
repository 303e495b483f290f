"""Rows of a comparison: what each run did by its own files, and what several seeds say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from visiontrain.report.meanings import has_several

SCORES = {  # of metrics.json by what is scored; the main one first
    "detect": {"map": "mAP", "map50": "mAP50"},
    "classify": {"top1": "top-1", "top5": "top-5"},
    "several": {"map": "mAP", "f1": "F1"},
}
NOT_MEASURED = "not measured"
CONTROL, ONE_DEVICE = "control", "one device"  # classes of rows that nothing is measured of
LOST = {  # of metrics.json: what faults cost
    "skipped_steps": "steps that were not finite",
    "lost_updates": "updates that a server had not saved",
    "dropped": "gradients that came too late",
    "restarts": "processes, workers and servers started again",
    "clients_late": "results of clients that came too late",
    "clients_failed": "clients that could not train",
    "clients_refused": "results of clients that were refused",
}
SPLIT = {  # of the time of a run, in seconds; what a mode does not tell apart stands together
    "compute": "computing",
    "compute_communication": "computing and communication, not told apart",
    "compute_data": "computing and data, not told apart",
    "data": "waiting for data",
    "communication": "communication",
    "waiting": "waiting for other workers",
    "rounds": "rounds of the engine in which no client can have trained",
    "scoring": "scoring and saving",
    "starting": "starting and ending processes",
}
SILENT = ("single", "placement", "client")  # modes of one process, which talk to nobody


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run stood after an epoch, or a round."""

    samples: float
    seconds: float
    bytes: float  # sent by the main process
    score: float  # the main one, on the val split


def decided(scores: Mapping[str, float]) -> float | None:
    """Return the main one of the scores; None where there is none, or no label decides it."""
    found = next(iter(scores.values()), None)
    return None if found is None or math.isnan(found) else found


@dataclass(frozen=True, slots=True)
class Trial:
    """One run. Numbers are None, and mappings empty, where there are none."""

    name: str  # of its folder
    seed: int
    folder: str = ""  # in the comparison's
    scores: Mapping[str, float] = field(default_factory=dict)
    per_class: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    curve: Sequence[Point] = ()
    seconds: float | None = None
    whole_seconds: float | None = None  # with the start and end of all processes
    steps: int | None = None
    samples: int | None = None
    images_per_s: float | None = None
    processes: int | None = None
    threads: int | None = None
    bytes_sent: int | None = None
    bytes_received: int | None = None  # by a federated server, of its clients
    peaks_rss_mb: Sequence[float] = ()
    split: Mapping[str, float] = field(default_factory=dict)  # seconds by keys of SPLIT
    lost: Mapping[str, int] = field(default_factory=dict)  # counts by keys of LOST
    staleness: float | None = None
    stalenesses: Mapping[str, int] = field(default_factory=dict)  # updates by age
    rounds: int | None = None
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    client_spread: float | None = None
    worst_client: float | None = None
    mean_client: float | None = None
    error: str | None = None
    initial_sha256: str | None = None
    config_sha256: str | None = None

    @property
    def score(self) -> float | None:
        """Return the main score; None also where no label decides it."""
        return decided(self.scores)


@dataclass(frozen=True, slots=True)
class Row:
    """What one mode reached: means over its seeds. None, and empty, where there is nothing."""

    name: str
    strategy: Mapping[str, Any]  # its section of the config, as it ran
    keys: Mapping[str, Any] = field(default_factory=dict)  # other keys of its own
    processes: int | None = None
    threads: int | None = None  # of the CPU, in each process
    scores: Mapping[str, float] = field(default_factory=dict)  # on the val split, main one first
    spread: float | None = None  # standard deviation of the main score over seeds
    seeds: Sequence[int] = ()  # those that came to their end
    difference: float | None = None  # of the main score, to the control's
    noise: float | None = None  # twice the standard error of that; see `related`
    word: str | None = None  # of both: within noise, better, worse, one seed, no spread
    seconds: float | None = None  # training, scoring and saving; not starting
    steps: int | None = None
    samples: int | None = None
    images_per_s: float | None = None  # training alone
    speedup: float | None = None  # in images/s, over the row of one device
    efficiency: float | None = None  # T1 / (W * TW); see `related`
    bytes_per_step: float | None = None  # that the main process sent to others
    bytes_sent: int | None = None  # likewise, in the whole run
    bytes_received: int | None = None  # by a federated server, of its clients
    peak_rss_mb: float | None = None  # of the largest process
    peaks_rss_mb: Sequence[float] = ()  # of each, the most of all seeds
    split: Mapping[str, float] = field(default_factory=dict)  # seconds by keys of SPLIT
    lost: Mapping[str, int] = field(default_factory=dict)  # by keys of LOST, over all seeds
    staleness: float | None = None  # mean updates between reading and applying
    rounds: int | None = None  # of a federated run
    client_spread: float | None = None  # standard deviation of scores over clients
    worst_client: float | None = None  # score of the common weights on its own images
    exactness: str = NOT_MEASURED  # control, exact, approximate, different algorithm
    reasons: Sequence[str] = ()  # why not exact, or why not measured
    check_steps: int | None = None  # over which exactness was measured
    gap: float | None = None  # largest difference of a weight to one device's, after those
    error: str | None = None  # why there are no numbers, or not of all seeds
    initial_sha256: str | None = None  # of the weights it began with, under the first seed
    config_sha256: str | None = None  # of its config.yaml, likewise
    trials: Sequence[Trial] = ()  # one per seed
    alone: str = ""  # of a federated run: the row of its clients without each other

    def flat(self) -> dict[str, Any]:
        """Return the fields as JSON values, with scores among them under their own names."""
        found: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            found |= dict(value) if name == "scores" else {name: value}
        lists = ("reasons", "seeds", "peaks_rss_mb")
        return found | {name: list(found[name]) for name in lists}

    @property
    def score(self) -> float | None:
        """Return the main score; None also where no label decides it."""
        return decided(self.scores)


# -- one run ----------------------------------------------------------------------------


def scored_as(metrics: Mapping[str, Any]) -> str:
    """Return the key of SCORES that a run's metrics.json fits."""
    return "several" if has_several(metrics) else str(metrics["task"])


def measured(
    trial: Trial,
    metrics: Mapping[str, Any],
    epochs: Sequence[Mapping[str, str]] = (),
    whole: float | None = None,
) -> Trial:
    """Fill a trial from a run's files.

    Args:
        trial: of what run.
        metrics: its metrics.json.
        epochs: rows of its results.csv.
        whole: seconds that all of it took, where nothing interrupted it.
    """
    titles = SCORES[scored_as(metrics)]
    federated = "clients_up" in metrics
    return replace(
        trial,
        scores={name: _known(metrics.get(name)) for name in titles},
        per_class=metrics.get("per_class", {}),
        curve=curve_of(epochs, next(iter(titles))),
        seconds=metrics["seconds"],
        whole_seconds=whole,
        steps=metrics["steps"],
        samples=metrics["samples"],
        images_per_s=metrics["train_images_per_s"],
        processes=metrics["processes"],
        threads=metrics["threads"],
        bytes_sent=metrics["bytes_sent"],
        bytes_received=metrics["clients_up"] if federated else None,
        peaks_rss_mb=metrics.get("peaks_rss_mb") or [metrics["peak_rss_mb"]],
        split=split_of(metrics, epochs, whole),
        lost={key: int(metrics[key]) for key in LOST if key in metrics},
        staleness=metrics.get("staleness"),
        stalenesses=metrics.get("stalenesses", {}),
        rounds=metrics["steps"] if federated else None,
        clients=metrics.get("clients", {}) if federated else {},
        client_spread=metrics.get("client_spread"),
        worst_client=metrics.get("worst_client"),
        mean_client=metrics.get("mean_client"),
        initial_sha256=metrics["initial_sha256"],
        config_sha256=metrics["config_sha256"],
    )


def _known(value: float | None) -> float:
    """Return a score; one that no label decides, null in JSON, is nan."""
    return math.nan if value is None else float(value)


def curve_of(epochs: Sequence[Mapping[str, str]], score: str) -> list[Point]:
    """Return where a run stood whenever it was scored."""
    return [
        Point(
            float(row["samples"]),
            float(row["seconds"]),
            float(row.get("bytes_sent", 0)),
            float(row[f"val/{score}"]),
        )
        for row in epochs
        if math.isfinite(float(row.get(f"val/{score}", "nan")))
    ]


def split_of(
    metrics: Mapping[str, Any], epochs: Sequence[Mapping[str, str]], whole: float | None
) -> dict[str, float]:
    """Say what a run's seconds went into, as far as its mode measures it.

    Args:
        metrics: its metrics.json.
        epochs: rows of its results.csv.
        whole: seconds that all of it took.
    """
    rate, kind = metrics["train_images_per_s"], metrics["strategy"]
    train = metrics["samples"] / rate if rate else 0.0
    found: dict[str, float] = {}
    if kind == "parameter_server":
        found["communication"] = train * metrics.get("exchange", 0.0)
        found["waiting"] = train * metrics.get("wait", 0.0)
        found["compute_data"] = train - sum(found.values())
    elif kind == "federated":
        found["rounds"] = min(train, metrics.get("clients_engine_s", 0.0))
        found["compute_data"] = train - found["rounds"]
    else:
        found["data"] = min(train, _waited(epochs))
        rest = "compute" if kind in SILENT else "compute_communication"
        found[rest] = train - found["data"]
    found["scoring"] = max(0.0, metrics["seconds"] - train)
    if whole is not None:
        found["starting"] = max(0.0, whole - metrics["seconds"])
    return {key: found[key] for key in SPLIT if key in found}


def _waited(epochs: Sequence[Mapping[str, str]]) -> float:
    """Return the seconds that the main process waited for data."""
    total, before = 0.0, 0.0
    for row in epochs:
        images, rate = float(row["samples"]) - before, float(row.get("images_per_s", 0))
        before = float(row["samples"])
        total += float(row.get("data_wait", 0)) * (images / rate if rate else 0.0)
    return total


# -- several seeds ----------------------------------------------------------------------


def together(row: Row, trials: Sequence[Trial]) -> Row:
    """Fill a row from its runs: means, and of memory the most."""
    good = [trial for trial in trials if not trial.error]
    row = replace(row, trials=list(trials), error=_errors(trials))
    if not good:
        return row
    first = good[0]
    sent, steps = _mean(good, lambda t: t.bytes_sent), _mean(good, lambda t: t.steps)
    peaks = [max(values) for values in _columns(good)]
    return replace(
        row,
        processes=first.processes,
        threads=first.threads,
        scores={name: sum(t.scores[name] for t in good) / len(good) for name in first.scores},
        spread=_spread([t.score for t in good]),
        seeds=[trial.seed for trial in good],
        seconds=_mean(good, lambda t: t.seconds),
        steps=_whole(steps),
        samples=_whole(_mean(good, lambda t: t.samples)),
        images_per_s=_mean(good, lambda t: t.images_per_s),
        bytes_per_step=sent / steps if sent is not None and steps else None,
        bytes_sent=_whole(sent),
        bytes_received=_whole(_mean(good, lambda t: t.bytes_received)),
        peak_rss_mb=max(peaks, default=None),
        peaks_rss_mb=peaks,
        split={k: _sum(t.split[k] for t in good) / len(good) for k in _common(good)},
        lost={key: sum(t.lost.get(key, 0) for t in good) for key in _told(good)},
        staleness=_mean(good, lambda t: t.staleness),
        rounds=first.rounds,
        client_spread=_mean(good, lambda t: t.client_spread),
        worst_client=_mean(good, lambda t: t.worst_client),
        initial_sha256=first.initial_sha256,
        config_sha256=first.config_sha256,
    )


def _errors(trials: Sequence[Trial]) -> str | None:
    found = [trial for trial in trials if trial.error]
    if len(found) == len(trials) == 1:
        return found[0].error
    return "\n".join(f"seed {t.seed}: {t.error}" for t in found) or None


def _columns(trials: Sequence[Trial]) -> list[Sequence[float]]:
    """Return the peaks of each process over trials; they may have had other numbers of them."""
    most = max(len(t.peaks_rss_mb) for t in trials)
    return [[t.peaks_rss_mb[k] for t in trials if k < len(t.peaks_rss_mb)] for k in range(most)]


def _common(trials: Sequence[Trial]) -> list[str]:
    return [key for key in SPLIT if all(key in trial.split for trial in trials)]


def _told(trials: Sequence[Trial]) -> list[str]:
    """Name what any of the trials lost to faults, or says that it did not."""
    return [key for key in LOST if any(key in trial.lost for trial in trials)]


def _sum(values: Any) -> float:
    return math.fsum(values)


def _mean(trials: Sequence[Trial], value: Callable[[Trial], float | None]) -> float | None:
    found = [number for number in map(value, trials) if number is not None]
    return sum(found) / len(found) if found else None


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _spread(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation of a sample; None of one value."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return None
    if min(known) == max(known):
        return 0.0  # not what is left of rounding their mean
    middle = sum(known) / len(known)
    return math.sqrt(sum((value - middle) ** 2 for value in known) / (len(known) - 1))
