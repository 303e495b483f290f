"""Recipes for clusters: what they do, with stand-ins for Slurm's commands and for Ray."""

import json
import os
import socket
import subprocess
import sys

from visiontrain.core.shipped import shipped

RECIPES = shipped("cfg") / "cluster"
PATHS = os.pathsep.join(path for path in sys.path if path)
ENV = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
SMALL = ["data=tiny", "data.train_images=6", "imgsz=64", "batch=3", "device=cpu", "plots=false"]
SMALL += ["augment=none"]

# Two tasks on this machine, as srun starts them. At the first start it plays the time limit too:
# once the run stands, both get SIGUSR1. It returns the highest exit code, as srun does.
SRUN = """#!/bin/sh
echo "$@" >> srun.log
while case "$1" in --*) true ;; *) false ;; esac; do shift; done
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=vt1
export SLURM_STEP_ID=0 SLURM_NODEID=0
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & other=$!
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
if [ ! -e requeue.log ]; then
  while [ ! -e run/checkpoints/last ]; do sleep 0.02; done
  kill -USR1 $first $other
fi
wait $other; code=$?
wait $first; mine=$?
[ $mine -gt $code ] && code=$mine
exit $code
"""
COMMANDS = {
    "srun": SRUN,
    "scontrol": '#!/bin/sh\necho "$@" >> requeue.log\n',
    "visiontrain": f'#!/bin/sh\nexec "{sys.executable}" -m visiontrain "$@"\n',
}


def test_a_slurm_job_is_requeued_until_its_run_is_complete(tmp_path):
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def job():
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", str(RECIPES / "slurm.sbatch"), *SMALL, "epochs=3", "out=run"],
            cwd=tmp_path,
            env=ENV | {"PATH": path, "SLURM_JOB_ID": "4711", "SLURM_CPUS_PER_TASK": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    code, output = job()
    assert code == 0, output  # it asked for the queue, and that worked
    assert "go on with: visiontrain train out=run resume=true" in output
    assert (tmp_path / "requeue.log").read_text() == "requeue 4711\n"
    assert not (tmp_path / "run" / "metrics.json").exists()
    code, output = job()
    assert code == 0, output
    assert "going on, from run/checkpoints/step-" in output
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["epochs"], metrics["processes"]) == (3, 2)
    assert (tmp_path / "requeue.log").read_text() == "requeue 4711\n"
    assert (
        (tmp_path / "srun.log").read_text().startswith("--cpus-per-task=1 --wait=120 visiontrain")
    )


# What Ray does before it calls the function: variables, and a group of its own.
AS_RAY = """
import sys
import torch.distributed as dist
from runpy import run_path
dist.init_process_group("gloo")
worker = run_path(sys.argv[1])["train_worker"]
worker({"data": "tiny", "data.train_images": 6, "imgsz": 64, "batch": 3, "epochs": 1,
        "device": "cpu", "plots": False, "augment": "none", "out": "run"})
assert dist.is_initialized()  # it is Ray's to leave
dist.destroy_process_group()
"""


def test_rays_workers_train_one_run_in_the_group_that_ray_formed(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    told |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", AS_RAY, str(RECIPES / "ray_train.py")],
            cwd=tmp_path,
            env=ENV | told | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("1", "0")
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["processes"] == 2
