"""Several machines: two network namespaces, joined by a cable, stand in for hosts."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from small import KEYS, config

from visiontrain import app
from visiontrain.core.errors import DataError
from visiontrain.core.shipped import shipped
from visiontrain.core.types import Place
from visiontrain.prepare import prepare
from visiontrain.recipe import Run
from visiontrain.strategies import comm

RECIPES = shipped("cfg") / "cluster"
SMALL = ["data=tiny", "data.train_images=6", "imgsz=64", "batch=3", "device=cpu"]
SMALL += ["augment=none", "strategy=ddp", "log.plots=false", "out=run"]
AS_SMALL = KEYS | {"data": {"source": "tiny", "train_images": 6}, "batch": 3, "strategy": "ddp"}
AS_SMALL |= {"augment": "none"}
MARGIN_S = 250  # where other work fills the machine
PATHS = os.pathsep.join(path for path in sys.path if path)
ENV = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}


class Host:
    """A network namespace with a name, an address and a folder of its own."""

    def __init__(self, number, folder):
        self.namespace = f"visiontrain-{os.getpid()}-{number}"
        self.name, self.address, self.folder = f"vt{number}", f"10.99.0.{number}", folder
        self.cable = f"vt{os.getpid() % 100000}-{number}"
        self.etc = Path("/etc/netns") / self.namespace

    def start(self, *command, **env):
        """Start a command there; its output is read by `ended`."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *named, *command],
            cwd=self.folder,
            env=ENV | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def ended(processes, hosts=()):
    """Wait for processes; return their exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=MARGIN_S)[0] for process in processes]
    except subprocess.TimeoutExpired:
        for host in hosts:
            clear(host.namespace)
        for process in processes:
            process.kill()
        outputs = [process.communicate()[0] for process in processes]
        pytest.fail("\n".join(outputs))
    return [process.returncode for process in processes], outputs


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def clear(namespace):
    """End what still runs there: torchrun's workers outlive it when it is killed."""
    for pid in ip("netns", "pids", namespace).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def remove(namespace):
    clear(namespace)
    ip("netns", "del", namespace)
    shutil.rmtree(Path("/etc/netns") / namespace, ignore_errors=True)


def sweep():
    """Remove what tests left that were killed themselves."""
    for line in ip("netns", "list").stdout.splitlines():
        match = re.match(r"visiontrain-(\d+)-\d+\b", line)
        if match and not Path(f"/proc/{match[1]}").exists():
            remove(match[0])


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Return two hosts, which call themselves 127.0.1.1 as Debian's do; skip without the rights."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    sweep()
    both = [Host(number, tmp_path_factory.mktemp(f"vt{number}")) for number in (1, 2)]
    try:
        for host in both:
            if ip("netns", "add", host.namespace).returncode:
                pytest.skip("network namespaces cannot be made here")
        first, second = both
        ends = [(host.cable, "netns", host.namespace) for host in both]
        assert not ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1]).returncode
        for host, other in ((first, second), (second, first)):
            inside = ("-n", host.namespace)
            ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.cable)
            for name in (host.cable, "lo"):
                assert not ip(*inside, "link", "set", name, "up").returncode
            host.etc.mkdir(parents=True)
            known = [
                "127.0.0.1 localhost",
                f"127.0.1.1 {host.name}",
                f"{other.address} {other.name}",
            ]
            (host.etc / "hosts").write_text("\n".join(known) + "\n")
        yield both
    finally:
        for host in both:
            remove(host.namespace)


def torchrun(*words):
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", *words]


@pytest.fixture(scope="module")
def trained(hosts):
    """Return the run that two hosts trained for an epoch, the way torchrun's manual says."""
    words = ["--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=vt1:29400"]
    command = torchrun(*words, "-m", "visiontrain", "train", *SMALL, "epochs=1")
    codes, outputs = ended([host.start(*command) for host in hosts], hosts)
    assert codes == [0, 0], outputs
    return hosts[0].folder / "run"


def train_here(out, epochs):
    """Be one rank of two on this host; train as the hosts do."""
    rank = dist.get_rank()
    keys = AS_SMALL | {"epochs": epochs, "resume": "auto"}
    text = prepare(config(out, **keys)).model_dump_json() if rank == 0 else None
    run = Run.model_validate_json(comm.broadcast_json(text))
    app.build(run, Place(torch.device("cpu"), rank, 2, (rank, 2), is_main=rank == 0)).fit()


def assert_same_weights(one, other):
    mine, theirs = (load_file(run / "weights" / "last.safetensors") for run in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def moved(run, hosts, name):
    """Copy a run to the first host alone, under a name."""
    shutil.copytree(run, hosts[0].folder / name)
    return hosts[0].folder / name


@pytest.fixture(scope="module")
def here(ranks, tmp_path_factory):
    """Return the run that two processes of this host trained for an epoch."""
    out = tmp_path_factory.mktemp("here") / "run"
    ranks(2).run(train_here, out, 1)
    return out


def test_torchrun_on_two_hosts_equals_one_host(trained, hosts, here):
    assert_same_weights(trained, here)
    assert json.loads((trained / "metrics.json").read_text())["processes"] == 2
    assert not list(hosts[1].folder.iterdir())  # rank 0 alone writes


def test_srun_on_two_hosts_goes_on_with_a_run_that_one_of_them_sees(
    trained, hosts, here, ranks, tmp_path
):
    run = moved(trained, hosts, "on")
    step = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_STEP_NODELIST": "vt[1-2]",
        "SLURM_LOCALID": "0",
    }
    # model.norm says no kind of model: the run's own is taken, which only the first host knows.
    words = [*SMALL, "out=on", "epochs=2", "resume=true", "model.norm=batch"]
    command = [sys.executable, "-m", "visiontrain", "train", *words]
    codes, outputs = ended(
        [
            host.start(*command, **step, SLURM_PROCID=str(rank), SLURM_NODEID=str(rank))
            for rank, host in enumerate(hosts)
        ],
        hosts,
    )
    assert codes == [0, 0], outputs
    assert not (hosts[1].folder / "on").exists()
    shutil.copytree(here, tmp_path / "run")
    ranks(2).run(train_here, tmp_path / "run", 2)
    assert_same_weights(run, tmp_path / "run")


def test_the_recipe_for_torchrun_meets_a_pod_of_a_train_job(trained, hosts):
    """Both are torchrun, so one host starts as the recipe does, the other as Kubeflow's pods do.

    A complete run only writes its results again, for which all ranks have to meet.
    """
    run = moved(trained, hosts, "again")
    (run / "metrics.json").unlink()
    words = [*SMALL, "out=again", "epochs=1", "resume=auto"]
    first, other = hosts
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    recipe = ["sh", str(RECIPES / "torchrun_two_hosts.sh"), "0", "vt1", *words]
    pod = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": "1"}
    pod |= {"PET_MASTER_ADDR": "vt1", "PET_MASTER_PORT": "29500"}
    started = [
        first.start(*recipe, PROCESSES="1", PATH=path),
        other.start(sys.executable, "-m", "visiontrain", "train", *words, "strategy=ddp", **pod),
    ]
    codes, outputs = ended(started, hosts)
    assert codes == [0, 0], outputs
    assert json.loads((run / "metrics.json").read_text())["processes"] == 2
    assert list(other.folder.iterdir()) == []


# -- nothing listens beyond the loopback ------------------------------------------------------

WAIT = """
import entries
from visiontrain.strategies.config import DDP
from visiontrain.strategies.launch import run
run(DDP(threads=1), "cpu", entries.wait, "1")
"""


def listening(pids):
    """Return the addresses, as the kernel prints them, that processes listen on."""
    open_files = (fd for pid in pids for fd in Path(f"/proc/{pid}/fd").iterdir())
    sockets = {str(fd.readlink()) for fd in open_files if fd.is_symlink()}
    rows = []
    for table in ("tcp", "tcp6"):
        rows += [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
    return [
        row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets
    ]


@pytest.mark.parametrize("by_hand", [False, True], ids=["by us", "by hand"])
def test_processes_of_one_machine_listen_on_the_loopback_only(by_hand):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WAIT],
            env=ENV | ({**told, "RANK": str(rank)} if by_hand else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2 if by_hand else 1)
    ]
    try:
        lines = [process.stdout.readline() for process in started for _ in range(2 // len(started))]
        workers = [int(line.split()[1]) for line in lines]
        found = listening({*workers, *(process.pid for process in started)})
    finally:
        for process in started:
            process.terminate()
        assert ended(started)[0] == [0] * len(started)
    assert len(found) >= 3  # the store, and gloo in both
    assert set(found) == {"0100007F"}


# -- data that not every machine has -----------------------------------------------------------


def build_with(out, source, images):
    """Be a rank whose machine has other data than the first's."""
    rank = dist.get_rank()
    given = {"source": source, "train_images": images} if rank else {"source": "tiny"}
    run = config(out, **AS_SMALL | {"data": {"train_images": 6} | given})
    place = Place(torch.device("cpu"), rank, 2, (rank, 2), is_main=rank == 0)
    try:
        app.build(run, place)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("source", "images", "message"),
    [
        ("nowhere.yaml", 6, "{host}: data: nothing at nowhere.yaml"),
        ("tiny", 5, "{host}: data: 5 images in train, rank 0 has 6, or other labels"),
    ],
)
def test_a_host_without_the_data_ends_the_whole_run(ranks, tmp_path, source, images, message):
    one, other = ranks(2).run(build_with, tmp_path, source, images)
    assert one == other
    assert one.startswith(message.format(host=socket.gethostname()))
    assert one.endswith("(rank 1)")
