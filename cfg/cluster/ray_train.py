"""Train with Ray Train: `python ray_train.py WORKERS data=/data/my.yaml out=/data/runs/my`.

Every worker runs visiontrain's Python API. Ray starts them, sets RANK and the rest, and forms
their group; `resume="auto"` lets a run go on when Ray starts workers anew. The data and `out`
have to be seen by all workers. Ray's own ports take orders from anybody who reaches them: keep
them on a network that you trust (docs.ray.io, Security).
"""

from __future__ import annotations

import sys
from typing import Any

import yaml

import visiontrain as vt


def train_worker(keys: dict[str, Any]) -> None:
    """Be one worker: train with the others."""
    run = vt.train(**{"strategy": "ddp", "resume": "auto", **keys})
    if run.exit_code:
        raise SystemExit(run.exit_code)


def main(words: list[str]) -> None:
    """Start the workers and wait for them."""
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    pairs = (word.split("=", 1) for word in words[1:])
    keys = {key: yaml.safe_load(value) for key, value in pairs}
    is_cuda = torch.cuda.is_available()
    TorchTrainer(
        train_worker,
        train_loop_config=keys,
        scaling_config=ScalingConfig(num_workers=int(words[0]), use_gpu=is_cuda),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3)),
        # Flags and JSON travel between CPUs, gradients between GPUs.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if is_cuda else "gloo"),
    ).fit()


if __name__ == "__main__":
    main(sys.argv[1:])
