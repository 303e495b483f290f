"""What launchers tell: every launcher's own variables, and shells that only look like one."""

from pathlib import Path

import pytest

from visiontrain.core.errors import ConfigError
from visiontrain.strategies import environment as module
from visiontrain.strategies.environment import (
    FIRST_PORT,
    PORTS,
    Launched,
    cpu_threads,
    first_host,
    launched,
    tasks_per_node,
    wants_torchrun,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "1234",
    "TORCHELASTIC_ERROR_FILE": "/tmp/torchelastic_x/none_y/attempt_2/1/error.json",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RUN_ID": "none",
}
SBATCH = {  # in a batch script, and in a shell that salloc opened
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-node1-77@1",
}


def test_torchrun():
    found = launched(TORCHRUN)
    kept = Path("/tmp/torchelastic_x/none_y")
    assert found == Launched("torchrun", 5, 8, "node1", 1234, 1, 4, has_agent=True, scratch=kept)
    assert not found.is_alone
    one = launched(TORCHRUN | {"LOCAL_WORLD_SIZE": "8"})
    assert one.is_alone
    assert one.address == "127.0.0.1"


def test_a_pod_of_a_pytorchjob():
    """RANK and WORLD_SIZE count pods of one process; nobody tells what is local."""
    pod = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    found = launched(pod | {"PET_NPROC_PER_NODE": "1", "PET_NNODES": "8"})
    assert found == Launched("torchrun", 5, 8, "node1", 1234)
    assert not found.is_alone
    assert not wants_torchrun(pod | {"PET_NPROC_PER_NODE": "1", "PET_NNODES": "8"})
    assert wants_torchrun(pod | {"PET_NPROC_PER_NODE": "4"})


def test_srun():
    found = launched(SRUN)
    assert (found.by, found.rank, found.world) == ("srun", 6, 7)
    assert (found.local_rank, found.local_world) == (2, 3)
    assert found.address == "gpu03"
    assert found.port in range(FIRST_PORT, FIRST_PORT + PORTS)
    others = [launched(SRUN | {"SLURM_PROCID": str(rank)}).port for rank in range(7)]
    assert set(others) == {found.port}
    assert launched(SRUN | {"SLURM_STEP_ID": "2"}).port != found.port
    named = launched(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"})
    assert (named.address, named.port) == ("10.0.0.1", 77)
    one = launched(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"})
    assert one.is_alone
    assert one.address == "127.0.0.1"


@pytest.mark.parametrize(
    "env",
    [
        {},
        SBATCH,
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # one task starts its own processes
        SRUN | {"SLURM_PTY_PORT": "1"},  # a shell: srun -n7 --pty bash
        MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "sbatch or salloc", "one task", "a shell", "mpirun -n 1"],
)
def test_nobody_waits_for_others(env):
    assert launched(env) is None


def test_mpirun():
    """Its daemons are started by srun, so that its processes carry both."""
    daemon = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    found = launched(daemon | MPIRUN)
    assert (found.by, found.rank, found.world, found.local_rank) == ("mpirun", 1, 2, 1)
    assert found.address == "127.0.0.1"
    assert found.port in range(FIRST_PORT, FIRST_PORT + PORTS)
    assert launched(MPIRUN | {"PMIX_NAMESPACE": "prterun-node1-78@1"}).port != found.port
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR: not set; add -x MASTER_ADDR=HOST"):
        launched(MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4"})
    many = launched(MPIRUN | {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "node1"})
    assert (many.address, many.is_alone) == ("node1", False)


def test_torchrun_inside_a_slurm_job_wins():
    assert launched(SRUN | MPIRUN | TORCHRUN).by == "torchrun"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, r"^RANK: 'one'; "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"^MASTER_ADDR: not set, but WORLD_SIZE is 2; "),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "x"}, r"^SLURM_STEP_NUM_TASKS: 'x'; "),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, r"^SLURM_LOCALID: not set; "),
    ],
)
def test_variables_that_cannot_be(env, message):
    with pytest.raises(ConfigError, match=message):
        launched(env)


@pytest.mark.parametrize(
    ("env", "wants"),
    [
        ({}, False),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1"}, True),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, True),
        ({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"}, False),
        ({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"} | TORCHRUN, False),  # it was started
    ],
)
def test_kubeflow_leaves_torchrun_to_us(env, wants):
    assert wants_torchrun(env) is wants


@pytest.mark.parametrize(
    ("text", "counts"), [("4(x2),3", [4, 4, 3]), ("1", [1]), ("2(x3)", [2, 2, 2]), ("2,1", [2, 1])]
)
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("gpu[01-03,07],login1", "gpu01"),
        ("node7", "node7"),
        ("a-1,b-2", "a-1"),
        ("rack[2,5]n[08-09]", "rack2n08"),
        ("n[3,5-6]-ib.site", "n3-ib.site"),
    ],
)
def test_first_host(text, host):
    assert first_host(text) == host


def test_cpu_threads_of_a_process(monkeypatch):
    monkeypatch.setattr(module.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(module, "cores", lambda: 16)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_ON_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert cpu_threads(4) == 4
    monkeypatch.setattr(module, "cores", lambda: 3)  # bound to these by mpirun or srun
    assert cpu_threads(4) == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert cpu_threads(4) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun sets it
    assert cpu_threads(4) is None


@pytest.mark.parametrize(
    ("by", "cores", "is_bound"),
    [(SRUN, 8, True), (SRUN, 32, False), (MPIRUN, 8, True), (TORCHRUN, 8, False), ({}, 8, False)],
)
def test_a_process_that_is_bound_to_its_cores_shares_them_with_nobody(
    by, cores, is_bound, monkeypatch
):
    monkeypatch.setattr(module, "launched", lambda: launched(by))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    monkeypatch.setattr(module, "cores", lambda: cores)
    monkeypatch.setattr(module.os, "cpu_count", lambda: 32)
    assert module.bound(4) is is_bound
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "8")  # the job has no more of the machine
    assert not module.bound(4)
    assert not module.bound(1)
