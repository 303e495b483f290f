"""A comparison that no run made: seven modes with figures of every kind, names that attack."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from visiontrain.report.compare import Comparison
from visiontrain.report.related import related
from visiontrain.report.rows import Row, Trial, measured, together
from visiontrain.report.side_by_side import Sample, Shot

EVIL = "</script><script>document.title='x'</script><img src=x onerror=\"alert(1)\">"
NAMES = ["cat", "dog", EVIL]
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9"
    "awAAAABJRU5ErkJggg=="
)
MODES = {  # name: mode, other keys of it, speed, MB sent, score, processes
    "single": ("single", {}, 50.0, 0, 0.61, 1),
    "ddp": ("ddp", {}, 80.0, 390, 0.61, 2),
    "fsdp": ("fsdp", {}, 36.0, 580, 0.609, 2),
    "pipeline": ("pipeline", {}, 55.0, 72, 0.612, 2),
    "parameter_server": ("parameter_server", {"sync": "bsp"}, 47.0, 610, 0.608, 2),
    "parameter_server-sync=ssp": ("parameter_server", {"sync": "ssp"}, 52.0, 640, 0.55, 2),
    "federated-clients=2": ("federated", {"clients": 2}, 44.0, 30, 0.52, 2),
    "alone-clients=2": ("client", {"clients": 2}, 50.0, 0, 0.41, 1),
}
CLASSES = {"ddp": "exact", "fsdp": "exact", "pipeline": "exact", "parameter_server": "exact"}


def row_of(name, kind, scores, rate=10.0, **keys):
    """Return a row of scores by seed."""
    trials = [
        Trial(name, seed, scores={"map": score}, images_per_s=rate, processes=1)
        for seed, score in enumerate(scores)
    ]
    return replace(together(Row(name, {"kind": kind}), trials), **keys)


def metrics_of(mode, rate, megabytes, score, seed):
    """Return what metrics.json of such a run holds."""
    per_class = {name: {"map": score - 0.1 * k, "boxes": 7} for k, name in enumerate(NAMES)}
    found = {
        "task": "detect",
        "map": score,
        "map50": score + 0.2,
        "per_class": per_class,
        "names": NAMES,
        "steps": 40,
        "samples": 800,
        "seconds": 800 / rate + 3,
        "train_images_per_s": rate,
        "bytes_sent": megabytes * 10**6,
        "skipped_steps": 0,
        "strategy": mode,
        "processes": 2,
        "threads": 1,
        "peak_rss_mb": 900.0,
        "peaks_rss_mb": [900.0, 880.0 + seed],
        "initial_sha256": "a" * 64,
        "config_sha256": "b" * 64,
    }
    if mode == "parameter_server":
        found |= {"staleness": 0.7, "stalenesses": {"0": 10, "1": 30}, "wait": 0.1}
        found |= {"exchange": 0.2, "lost_updates": 0, "dropped": 2, "restarts": 1}
    if mode == "federated":
        clients = {
            str(k): {
                "images": 10 + k,
                "classes": [4, 3, 3 + k, 0],
                "common_score": 0.5,
                "own_score": 0.4,
            }
            for k in range(2)
        }
        found |= {"clients": clients, "clients_up": 3 * 10**7, "clients_engine_s": 2.5}
        found |= {"client_spread": 0.05, "worst_client": 0.44, "mean_client": 0.5}
        found |= {"clients_late": 0, "clients_failed": 1, "clients_refused": 0}
    return found


def epochs_of(rate, megabytes, score):
    """Return rows of results.csv of such a run."""
    return [
        {
            "epoch": str(k),
            "samples": str(80 * k),
            "seconds": str(80 * k / rate),
            "images_per_s": str(rate),
            "data_wait": "0.1",
            "val/map": str(score * (1 - np.exp(-k / 3))),
            "bytes_sent": str(megabytes * 10**5 * k),
        }
        for k in range(1, 11)
    ]


def comparison(folder, seeds=(0, 1, 2)):
    """Return a comparison of all modes, one of which failed."""
    rows = []
    for name, (mode, keys, rate, megabytes, score, processes) in MODES.items():
        trials = []
        for seed in seeds:
            own = score + 0.004 * (seed - 1)
            metrics = metrics_of(mode, rate, megabytes, own, seed) | {"processes": processes}
            trial = Trial(f"{name}-seed={seed}", seed, f"{name}-seed={seed}")
            trials.append(measured(trial, metrics, epochs_of(rate, megabytes, own), 800 / rate + 9))
        row = together(Row(name, {"kind": mode, **keys}), trials)
        rows.append(classed(row, mode))
    failed = Trial(EVIL, 0, error=f"{EVIL} went wrong\nwith a traceback")
    rows.append(together(Row(EVIL, {"kind": "ddp"}), [failed]))
    machine = {"cores": 2, "device": "cpu", "system": "Linux x86_64"}
    versions = {"visiontrain": "0", "torch": "2"}
    return Comparison(
        folder,
        related(rows),
        len(rows),
        "detect",
        "a" * 64,
        machine,
        versions,
        1,
        f"yolo_n on {EVIL}",
    )


def classed(row, mode):
    """Add how exact a mode is."""
    if mode in ("single", "client"):
        return replace(row, exactness="control" if mode == "single" else "one device")
    ssp = row.strategy.get("sync") == "ssp"
    name = "approximate" if ssp else CLASSES.get(mode, "different algorithm")
    reasons = () if name == "exact" else (f"because of {EVIL}",)
    return replace(row, exactness=name, reasons=reasons, check_steps=3, gap=1e-13)


def pictures():
    """Return samples of one pixel each."""
    shots = [Shot(name, f"2 boxes {EVIL}", PIXEL) for name in ("labels", *MODES)]
    return [Sample(f"{EVIL}.jpg", shots), Sample("b.jpg", shots)]
