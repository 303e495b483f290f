"""DESIGN 3a: every mode is one device's training, and the check notices when it is not."""

import functools
import json
import tempfile
from itertools import chain
from pathlib import Path

import cases
import pytest
import torch

from visiontrain.core.errors import ConfigError
from visiontrain.core.types import Place
from visiontrain.data.sampler import Plan, step_keys
from visiontrain.engine.parity import ALLOWED, ULPS, Check, Job, Parity, judge
from visiontrain.engine.trace import Trace, compare
from visiontrain.strategies import launch
from visiontrain.strategies.config import DDP
from visiontrain.strategies.stage import PER_PROCESS

pytestmark = pytest.mark.usefixtures("one_thread")
MODES = ("ddp", "fsdp", "pipeline")
CLIP = {"adamw": 8.0, "sgd": 15.0, "muon": 15.0}  # so that some steps are clipped and some are not
EPOCH = {"steps": cases.STEPS // cases.EPOCHS}
MOST = {"adamw": {}, "sgd": EPOCH, "muon": EPOCH}  # one optimizer sees both epochs, all the fp64
SEEDS = 20  # asked one after another, until one is as far off


def train(kind, optim, precision, *, steps=cases.STEPS, pool=None, permute=None, **changes):
    """Return a trace of `cases`' training and the assignments made in it."""
    run = {
        "strategy": {"kind": kind, **changes.pop("keys", {})},
        "precision": precision,
        "accumulate": cases.ACCUMULATE,
        "optim": {"kind": optim, "clip": CLIP[optim], **changes.pop("rates", {})},
    } | changes
    with tempfile.TemporaryDirectory() as folder:
        job = Job(run, steps, folder, permute).to_json()
        if pool:
            assignments = pool.run(cases.traced, job)[0]
        else:
            assignments = cases.run_traced(job, Place(cases.CPU))
        return Trace.load(Path(folder)), assignments


control = functools.cache(functools.partial(train, "single"))


@functools.cache
def rounding(optim, seed):
    """Return how far order and cuts alone move fp32 weights on one device."""
    other = train("single", optim, "fp32", permute=seed, accumulate=2 * cases.ACCUMULATE)[0]
    return compare(control(optim, "fp32")[0], other).weights


def too_far(gaps, precision):
    return {k: gaps[k] for k, allowed in ALLOWED[precision].items() if gaps[k] > allowed}


@pytest.mark.parametrize(
    ("mode", "optim", "world"),
    [
        *((mode, optim, 2) for mode in MODES for optim in ("adamw", "sgd")),
        *(("ddp", "adamw", 4), ("pipeline", "adamw", 4)),
        *((mode, "muon", 2) for mode in ("ddp", "pipeline")),  # fsdp cuts matrices: refused
        ("fsdp", "adamw", 3),  # which divides no dimension of the model
    ],
)
def test_fp64_is_one_device(mode, optim, world, ranks):
    few = world > 2  # four ranks are slow on two cores
    want, wanted = alone("few images", optim) if few else control(optim, "fp64", **MOST[optim])
    keys = KINDS["few images"] if few else MOST[optim]
    got, assigned = train(mode, optim, "fp64", pool=ranks(world), **keys)
    gaps = compare(want, got).as_dict()
    epochs = 1 if MOST[optim] else cases.EPOCHS
    assert len(want.samples) == (2 * 7 + 3 if few else epochs * cases.IMAGES)
    assert assigned == wanted
    assert len(assigned) == 2 * len(want.samples)
    assert not too_far(gaps, "fp64")
    assert gaps["first"] < 1e-9
    assert gaps["optimizer"] < 1e-9


def read_by(rank, world, **data):
    """List the rows that a rank reads in each step of the first epoch."""
    data = cases.DATA | data
    plan = Plan(data["batch"], 1, 0, cases.ACCUMULATE, (rank, world))
    steps = step_keys(data["images"], plan, 0)
    return [[row for cell in step.cells for _, row in cell] for step in steps]


# Without mosaics, which would bring boxes of other images along.
SINGLE = {"augment": {"mosaic": 0.0}}
KINDS = {
    "nms": {"model": {"head": "nms", "finest": 4}},
    "sides": {"augment": {"multi_scale": 0.5}, "steps": 4},
    "resnet": {"model": {"backbone": "resnet18"}, "norm": "frozen"},
    "convnext": {  # its maps are views with other strides
        "model": {"backbone": "convnext_atto"},
        "rates": {"body_lr": 0.5, "layer_decay": 0.9},
    },
    "few images": {"data": {"images": 10}, "steps": 3},  # in steps of 7 and 3
    "frozen": {"norm": "frozen", "freeze": 3},
    "no box at all": {"data": {"bare": list(range(cases.IMAGES))}},
    "a batch without a box": {"data": {"bare": read_by(0, 1)[0]}, "steps": 3} | SINGLE,
    "a rank without a box": {"data": {"bare": [*chain(*read_by(3, 4))]}, "steps": 4} | SINGLE,
    "a rank without data": {"data": {"batch": 3}, "steps": 3},
    "a last batch of one": {"data": {"images": 7, "batch": 3}, "steps": 4},
    "more ranks than images": {"data": {"images": 3, "batch": 8}},
}
SWITCHES = list(KINDS)[list(KINDS).index("frozen") :]
OF_TWO = ("frozen", "no box at all", "a batch without a box")  # which two ranks show as four do


@pytest.mark.parametrize(
    ("mode", "kind", "world"),
    [
        *((mode, "sides", 2) for mode in MODES),
        *(("pipeline", "nms", 2), ("fsdp", "resnet", 2)),
        *(("pipeline", "convnext", 2), ("fsdp", "convnext", 2)),
        *(("ddp", kind, 2 if kind in OF_TWO else 4) for kind in SWITCHES),
        ("pipeline", "more ranks than images", 4),
        *(("pipeline", "frozen", 4), ("pipeline", "no box at all", 2)),
    ],
)
def test_every_kind_of_detector_and_data_is_one_device(mode, kind, world, ranks):
    keys = {"steps": 2, **KINDS[kind]}
    want, wanted = alone(kind, "sgd")
    got, assigned = train(mode, "sgd", "fp64", pool=ranks(world), **keys)
    assert assigned == wanted
    assert not too_far(compare(want, got).as_dict(), "fp64")


@pytest.mark.parametrize(
    ("keys", "kind", "world"),
    [
        *(({"schedule": name}, "few images", 2) for name in sorted(PER_PROCESS) if name != "gpipe"),
        *(({"schedule": name}, "frozen", 2) for name in ("1f1b", "zero_bubble", "zbv")),
        ({"stages": ["head"], "schedule": "1f1b"}, "few images", 2),
        ({"data_parallel": 2}, "few images", 4),
        ({"data_parallel": 2, "schedule": "zbv"}, "a rank without data", 4),
        ({"data_parallel": 2, "sharded": True}, "few images", 4),
        ({"data_parallel": 2, "sharded": True, "schedule": "1f1b"}, "frozen", 4),
        ({"data_parallel": 2, "sharded": True, "schedule": "zero_bubble"}, "few images", 4),
    ],
)
def test_every_pipeline_is_one_device(keys, kind, world, ranks):
    if keys.get("schedule") == "zbv" and torch.__version__ < "2.12":
        pytest.skip("refused there")
    want, wanted = alone(kind, "sgd")
    changes = {"steps": 2, **KINDS[kind]}
    got, assigned = train("pipeline", "sgd", "fp64", pool=ranks(world), keys=keys, **changes)
    assert assigned == wanted
    assert not too_far(compare(want, got).as_dict(), "fp64")


SORTERS = {
    "tiny": {"model": {"kind": "resnet_tiny", "widths": (16, 32, 32), "depth": 3}},
    "yolo": {"model": {"kind": "yolo_n"}, "norm": "frozen", "freeze": 2},
    "timm": {"model": {"kind": "timm", "backbone": "resnet18"}, "norm": "frozen"},
    "several": {
        "model": {"kind": "resnet_tiny", "widths": (16, 32, 32)},
        "task": {"kind": "classify", "several": True},
    },
}
SORTING = {
    "task": {"kind": "classify", "class_weights": [0.5, *[1.0] * 8, 2.0]},
    "augment": {"cutmix": 0.3, "mixup": 0.3, "erasing": 0.3},
    "steps": 4,
}


@pytest.mark.parametrize(
    ("mode", "kind", "world"),
    [
        *((mode, "tiny", 2) for mode in MODES),
        *(("ddp", "tiny", 4), ("pipeline", "tiny", 4), ("ddp", "several", 2)),
        *(("pipeline", "yolo", 2), ("fsdp", "timm", 2), ("pipeline", "timm", 2)),
    ],
)
def test_every_kind_of_classifier_is_one_device(mode, kind, world, ranks):
    keys = SORTING | SORTERS[kind]
    want = sorted_alone(kind)
    got, _ = train(mode, "sgd", "fp64", pool=ranks(world), **keys)
    assert not too_far(compare(want, got).as_dict(), "fp64")
    assert want.norms != [0.0] * len(want.norms)


@functools.cache
def sorted_alone(kind):
    """Return what one device does with a kind of classifier."""
    return train("single", "sgd", "fp64", **SORTING | SORTERS[kind])[0]


@pytest.mark.parametrize("mutant", sorted(cases.MUTANTS))
def test_a_mistake_is_noticed_with_classes(mutant, ranks):
    low = 0.05  # so that all steps are clipped, which would hide another scale
    keys = (
        SORTING
        | SORTERS["tiny"]
        | {"rates": {"lr": 0.5, "clip": low if "clip" in mutant else 15.0}}
    )
    want, _ = train("single", "sgd", "fp64", **keys)
    got, _ = train("ddp", "sgd", "fp64", pool=ranks(2), mutant=mutant, **keys)
    assert {"weights", "ema"} <= too_far(compare(want, got).as_dict(), "fp64").keys()


@functools.cache
def alone(kind, optim):
    """Return what one device does under `kind`."""
    return train("single", optim, "fp64", **{"steps": 2, **KINDS[kind]})


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_synchronised_norms_are_one_devices_norms(mode, ranks):
    """Though shares differ, and the last step's one image leaves a rank without any."""
    keys = KINDS["a last batch of one"] | {"norm": "batch", "accumulate": 1}
    want, wanted = train("single", "sgd", "fp64", **keys)
    got, assigned = train(mode, "sgd", "fp64", pool=ranks(2), synced=True, **keys)
    assert assigned == wanted
    assert not too_far(compare(want, got).as_dict(), "fp64")


def test_the_data_are_what_their_names_say():
    def counts(kind):
        return [sum(step.values()) for step in alone(kind, "sgd")[0].counts]

    assert counts("no box at all") == [0, 0]
    assert [count > 0 for count in counts("a batch without a box")] == [False, True, True]
    assert read_by(3, 4, batch=3) == [[]] * 8
    assert len(read_by(0, 1, images=7, batch=3)[-1]) == 1
    assert [read_by(rank, 4, images=3, batch=8) for rank in (2, 3)] == [[[]], [[]]]
    assert sum(map(len, read_by(3, 4))) == 3


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("mode", MODES)
def test_fp32_differs_by_rounding(mode, optim, ranks):
    gaps = compare(control(optim, "fp32")[0], train(mode, optim, "fp32", pool=ranks(2))[0])
    assert not too_far(gaps.as_dict(), "fp32")
    seeds = (2 * rounding(optim, seed) for seed in range(SEEDS))
    assert gaps.weights <= ULPS or any(gaps.weights <= allowed for allowed in seeds)


@pytest.mark.parametrize("mutant", sorted(cases.MUTANTS))
@pytest.mark.parametrize("mode", MODES)
def test_a_mistake_is_noticed(mode, mutant, ranks):
    got, _ = train(mode, "sgd", "fp64", steps=2, pool=ranks(2), mutant=mutant)
    gaps = compare(control("sgd", "fp64", steps=2)[0], got).as_dict()
    assert {"weights", "ema"} <= too_far(gaps, "fp64").keys()


def test_the_control_moves_and_clips_some_steps():
    for optim, clip in CLIP.items():
        norms = control(optim, "fp64", **MOST[optim])[0].norms
        assert min(norms) < clip < max(norms)


def test_parity_measures_started_processes():
    """Through torch elastic and files, as `visiontrain parity` does."""
    run = {
        "strategy": {"kind": "ddp"},
        "device": "cpu",
        "precision": "fp32",
        "accumulate": 1,
        "optim": {"kind": "adamw", "clip": 8.0},
        "model": {"norm": "group"},
    }
    few = {"steps": 2, "seeds": (1, 1), "precisions": ("fp32",)}
    report = Parity(run, DDP(threads=1), cases.entry, **few).measure()
    assert (report.verdict, report.reasons) == ("exact", ())
    assert {check.precision for check in report.checks} == {"fp32"}


def test_modes_of_one_run_share_what_one_device_did(tmp_path, monkeypatch):
    started = []

    def here(mode, device, entry, text, objects):
        job = json.loads(text)
        started.append((mode.kind, getattr(mode, "compress_after", None)))
        job["run"]["strategy"] = {"kind": "single"}
        return entry(json.dumps(job), Place(cases.CPU), objects)

    monkeypatch.setattr(launch, "run", here)
    run = {"device": "cpu", "precision": "fp32", "accumulate": 1, "model": {"norm": "group"}}
    run |= {"optim": {"kind": "adamw", "clip": 8.0}}
    many = {"steps": 2, "precisions": ("fp64",), "controls": tmp_path}
    reports = [Parity(run, DDP(), cases.entry, **many).measure() for _ in range(2)]
    assert [report.verdict for report in reports] == ["exact"] * 2
    Parity(run, DDP(compress="topk"), cases.entry, **many).measure()
    # Whose first steps would be exact: what is compared is what follows.
    assert started == [("single", None), ("ddp", 0.05), ("ddp", 0.05), ("ddp", 0.0)]
    assert {check.precision for report in reports for check in report.checks} == {"fp64"}
    both = Parity(run, DDP(), cases.entry, steps=2, seeds=(1, 1), controls=tmp_path).measure()
    assert {check.precision for check in both.checks} == {"fp64", "fp32"}


def test_too_short_a_run_is_refused():
    with pytest.raises(ConfigError, match="the run ends after 8 steps, parity compares 9"):
        train("single", "sgd", "fp64", steps=9)


def test_the_verdict_names_the_norm_and_what_was_measured():
    run = {"model": {"norm": "batch"}}
    checks = [Check("fp64", "samples", 0.0, 0.0), Check("fp64", "weights", 0.5, 1e-6)]
    report = judge(run, "ddp", 8, checks)
    assert report.verdict == "approximate"
    assert report.reasons[0].startswith("model.norm=batch")
    assert report.reasons[1] == "fp64: weights after all steps 5.0e-01, over 1.0e-06"
    run["model"]["norm"] = "group"  # nothing excuses it
    assert judge(run, "ddp", 8, checks).reasons == report.reasons[1:]
    checks[0] = Check("fp64", "samples", 3.0, 0.0)
    assert judge(run, "ddp", 8, checks).verdict == "different algorithm"
