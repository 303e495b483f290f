"""Recipes in YAML against the fields that their readers know, and words against our own keys.

The fields are those of Kubeflow Trainer's TrainJob and TrainingRuntime (v1alpha1, as of 2.3), of
JobSet and of Kubernetes' pods, and of SkyPilot's task (0.14), as far as the recipes use them.
"""

import shlex
import subprocess

import pytest
import yaml

from visiontrain.core.config import load
from visiontrain.core.shipped import presets, shipped
from visiontrain.recipe import USES, Run

CFG = shipped("cfg")
RECIPES = CFG / "cluster"


def some(**fields):
    """Return the schema of a mapping with none but these fields; `_` asks for a field."""
    return fields


NAMED = some(name_=str)
POD = some(
    restartPolicy={"Never", "OnFailure"},
    terminationGracePeriodSeconds=int,
    containers_=[
        some(name_=str, image_=str, volumeMounts=[some(name_=str, mountPath_=str, readOnly=bool)])
    ],
    volumes=[
        some(
            name_=str,
            persistentVolumeClaim=some(claimName_=str),
            emptyDir=some(medium={"Memory", ""}, sizeLimit=str),
        )
    ],
)
STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
JOB = some(
    metadata=some(labels={STEP: {"trainer"}}),
    spec_=some(backoffLimit=int, template_=some(spec_=POD)),
)
RUNTIME = some(
    apiVersion_={"trainer.kubeflow.org/v1alpha1"},
    kind_={"TrainingRuntime"},
    metadata_=NAMED,
    spec_=some(
        mlPolicy=some(numNodes=int, torch=some(numProcPerNode=int)),
        template_=some(
            spec_=some(
                failurePolicy=some(maxRestarts=int),
                replicatedJobs_=[some(name_=str, template_=JOB)],
            )
        ),
    ),
)
AMOUNTS = {"cpu": str, "memory": str, "nvidia.com/gpu": str}
TRAIN_JOB = some(
    apiVersion_={"trainer.kubeflow.org/v1alpha1"},
    kind_={"TrainJob"},
    metadata_=NAMED,
    spec_=some(
        runtimeRef_=some(name_=str, kind={"TrainingRuntime"}),
        trainer=some(
            image=str,
            command=[str],
            args=[str],
            numNodes=int,
            numProcPerNode=int,
            resourcesPerNode=some(requests=AMOUNTS, limits=AMOUNTS),
        ),
    ),
)
SKY = some(
    name=str,
    workdir_=str,
    resources=some(accelerators=str, use_spot=bool),
    num_nodes=int,
    envs=some(BUCKET=str),
    file_mounts={"/data": some(name_=str, mode={"MOUNT", "COPY", "MOUNT_CACHED"})},
    setup=str,
    run=str,
)


def faults(value, schema, where=""):
    """List what does not fit a schema: a mapping, a list of one, a set of choices or a type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: no mapping"]
        known = {name.removesuffix("_"): part for name, part in schema.items()}
        found = [
            f"{where}.{n[:-1]}: missing" for n in schema if n[-1] == "_" and n[:-1] not in value
        ]
        found += [f"{where}.{name}: unknown" for name in value if name not in known]
        pairs = ((name, part) for name, part in value.items() if name in known)
        return found + [f for n, part in pairs for f in faults(part, known[n], f"{where}.{n}")]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: no list"]
        return [f for i, part in enumerate(value) for f in faults(part, schema[0], f"{where}.{i}")]
    fits = value in schema if isinstance(schema, set) else type(value) is schema
    return [] if fits else [f"{where}: {value!r}"]


def documents(name):
    return list(yaml.safe_load_all((RECIPES / name).read_text(encoding="utf-8")))


def test_the_train_job_and_its_runtime():
    runtime, job = documents("kubeflow_trainjob.yaml")
    assert faults(runtime, RUNTIME) == faults(job, TRAIN_JOB) == []
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert node["name"] == container["name"] == "node"  # the names that Trainer looks for
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    verb, words = job["spec"]["trainer"]["command"], job["spec"]["trainer"]["args"]
    assert verb == ["visiontrain", "train"]
    run = load(Run, words, CFG, USES["train"])
    assert run.resume == "auto"
    assert str(run.out).startswith(mounted["data"])
    job["spec"]["trainer"]["numProcsPerNode"] = 2
    del runtime["spec"]["template"]
    assert faults(job, TRAIN_JOB) == [".spec.trainer.numProcsPerNode: unknown"]
    assert faults(runtime, RUNTIME) == [".spec.template: missing"]


def test_the_task_for_skypilot():
    (task,) = documents("skypilot.yaml")
    assert faults(task, SKY) == []
    words = shlex.split(task["run"].replace("\\\n", " "))
    run = load(Run, words[words.index("visiontrain") + 2 :], CFG, USES["train"])
    assert (run.strategy.kind, run.resume) == ("ddp", "auto")
    assert str(run.out).startswith("/data/")
    task["num_nodes"] = "2"
    assert faults(task, SKY) == [".num_nodes: '2'"]


@pytest.mark.parametrize("name", ["torchrun_two_hosts.sh", "slurm.sbatch"])
def test_the_words_in_scripts_are_keys(name):
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)
    text = (RECIPES / name).read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = (line for line in text.splitlines() if "visiontrain train strategy" in line)
    words = shlex.split(line.partition("visiontrain train ")[2])
    run = load(Run, [word for word in words if word != "$@"], CFG, USES["train"])
    assert (run.strategy.kind, run.resume) == ("ddp", "auto")


def test_recipes_are_no_presets():
    assert RECIPES.is_dir()
    assert not [name for name in presets(CFG) if "cluster" in name]
