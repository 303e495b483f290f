#!/usr/bin/env python3
"""Train federated while some clients send their updates turned round and ten times too long.

    tools/poison.py [key=value ...]

Ten clients train a classifier of digits, two of them betray. Prints a JSON line for each rule: the
score on `val` of the last round's weights, and that without traitors. Clients are called in this
process, without Flower. Keys are those of `visiontrain train`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import clients  # noqa: E402 - of the tests

import visiontrain as vt  # noqa: E402
from visiontrain.strategies import registry  # noqa: E402

CLIENTS, TRAITORS, LENGTH = 10, 2, -10.0
KEYS: dict[str, Any] = {
    "data": "digits",
    "task": "classify",
    "model": {"kind": "resnet_tiny", "widths": [16, 32, 64], "norm": "group"},
    "imgsz": 32,
    "batch": 16,
    "precision": "fp32",
    "workers": 0,
    "device": "cpu",
    "log": {"plots": False, "to": []},
}
MODE = {"kind": "federated", "clients": CLIENTS, "rounds": 10, "local_epochs": 3}
CASES: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("fedavg, nobody betrays", False, {"clip": None}),
    ("fedavg", True, {"clip": None}),
    ("fedavg, clip=1", True, {"clip": 1.0}),
    ("median", True, {"algorithm": "median", "clip": None}),
    ("trimmed_mean", True, {"algorithm": "trimmed_mean", "faulty": 2, "clip": None}),
    ("multi_krum", True, {"algorithm": "multi_krum", "faulty": 2, "clip": None}),
)


class Traitorous(clients.Calls):
    """Clients of whom the first ones betray: x - 10 (y - x) in the place of y."""

    def ask(self, messages: Any, seconds: float, enough: int) -> Any:
        """Ask, and change what the traitors answer."""
        found = super().ask(messages, seconds, enough)
        for client in range(TRAITORS):
            if client in found and not isinstance(found[client], str):
                found[client] = turned(messages[client], found[client])
        return found


def turned(asked: Any, answer: Any) -> Any:
    """Return an answer whose numbers lie on the other side of those that were sent."""
    start, begun = values_from(answer), values_from(asked)
    if start == len(answer):  # it only said hello
        return answer
    mine, theirs = (m[n:].view(np.float32) for m, n in ((answer.copy(), start), (asked, begun)))
    moved = theirs + LENGTH * (mine - theirs)
    return np.concatenate([answer[:start], moved.view(np.uint8)])


def values_from(message: Any) -> int:
    """Return where a message's numbers begin."""
    return 12 + int.from_bytes(bytes(message[8:12]), "big")


def main() -> int:
    """Measure; return the exit code."""
    keys = dict(word.split("=", 1) for word in sys.argv[1:])
    for name, betrayed, change in CASES:
        kind = Traitorous if betrayed else clients.Calls
        registry.DRIVERS["federated"] = clients.server_of([], kind=kind)
        with tempfile.TemporaryDirectory(prefix="poison-") as folder:
            out = Path(folder) / "run"
            vt.train(**KEYS | keys, strategy=MODE | change, out=out)
            last = (out / "results.csv").read_text().splitlines()
            row = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
        line = {"rule": name, "top1": float(row["val/top1"]), "cosine": float(row["cosine"])}
        print(json.dumps(line | {"keys": keys}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
