#!/usr/bin/env python3
"""Repeat cells of NIID-Bench (Li et al. 2022, arXiv 2102.02079) on CIFAR-10.

    tools/niid.py [CELL ...] [--rounds N] [--out FOLDER] [key=value ...]

CELL is ALGORITHM-PARTITION, such as fedavg-iid, scaffold-dirichlet, fednova-classes; without one,
the three of 50 rounds and then six of 10. LeNet, ten clients, ten local epochs a round, batches of
64, SGD with momentum 0.9 at a constant rate of 0.01, crops and flips, as Flower's repetition of the
bench (its baseline niid_bench). The paper's accuracies and those of Flower stand beside ours for 50
rounds. Ours differ in this: the pictures are a JPEG copy, biases do not decay, each picture is
mirrored in every other epoch, one seed. Prints a JSON line per cell: top-1 on the test pictures of
the best round, as Flower's table has it, of the last one, and of each tenth of them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])  # clients' too
sys.path.insert(0, str(ROOT))

import visiontrain as vt  # noqa: E402
from visiontrain.core.yaml_loader import load_yaml  # noqa: E402

# Of 50 rounds, means of three seeds: the paper's table III, Flower's baselines/niid_bench.
PUBLISHED = {
    "fedavg-iid": (0.704, 0.7132),
    "fedavg-dirichlet": (0.682, 0.6247),
    "scaffold-dirichlet": (0.698, 0.6808),
}
SHORT = (
    *("fedprox-dirichlet", "fednova-dirichlet", "fedavg-classes"),
    *("scaffold-classes", "fedprox-classes", "fednova-classes"),
)
KEYS: dict[str, Any] = {
    "data": "cifar10",
    "task": {"kind": "classify", "smoothing": 0.0},
    "imgsz": 32,
    "batch": 64,
    "optim": {
        "kind": "sgd",
        "lr": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-5,
        "schedule": "constant",
        "warmup": 0,
        "clip": 1e6,
    },
    "augment": {"kind": "classify", "crop": 1.0, "translate": 0.125},
    "ema": False,
    "patience": 0,
    "precision": "fp32",
    "workers": 0,
    "device": "cpu",
    "log": {"plots": False},
}


class LeNet(nn.Sequential):
    """LeNet with ReLU and max-pooling, for pictures of 32 pixels."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            *(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)),
        )


def cell(name: str, rounds: int, out: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Train one cell; return what its line says."""
    algorithm, _, partition = name.partition("-")
    mode: dict[str, Any] = {
        "kind": "federated",
        "clients": 10,
        "rounds": rounds,
        "local_epochs": 10,
        "algorithm": algorithm,
        "partition": partition,
        "clip": None,
    }
    began = time.monotonic()
    folder = out / name
    run = vt.train(**KEYS | given, model=LeNet, strategy=mode, out=folder)
    if run.exit_code:
        sys.exit(run.exit_code)
    with (folder / "results.csv").open() as file:
        scores = [float(row["val/top1"]) for row in csv.DictReader(file)]
    return {
        "cell": name,
        "rounds": rounds,
        "top1": run.metrics["top1"],
        "last": scores[-1],
        "tenths": scores[:: -max(1, rounds // 10)][::-1],
        "published": PUBLISHED.get(name) if rounds == 50 else None,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def main() -> None:
    """Train the cells that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="CELL | key=value")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_intermixed_args()
    pairs = (word.split("=", 1) for word in asked.words if "=" in word)
    given = {key: load_yaml(value, key) for key, value in pairs}
    cells = [word for word in asked.words if "=" not in word] or [*PUBLISHED, *SHORT]
    out = asked.out or Path(tempfile.mkdtemp(prefix="niid-"))
    for name in cells:
        rounds = asked.rounds or (50 if name in PUBLISHED else 10)
        found = cell(name, rounds, out, given)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
