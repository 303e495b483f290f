"""Predicted speeds: the formulas on round numbers, and published figures from their own inputs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from visiontrain import extrapolation, planning
from visiontrain.core.errors import ConfigError
from visiontrain.extrapolation import Scale, extrapolate
from visiontrain.models.config import YoloN
from visiontrain.models.registry import build_model
from visiontrain.plan_config import PlanConfig
from visiontrain.recipe import Run
from visiontrain.strategies import forecast, low_rank, speeds
from visiontrain.strategies.config import Pipeline
from visiontrain.strategies.federated.messages import shared
from visiontrain.strategies.forecast import Facts
from visiontrain.strategies.links import Link, Network, all_reduce, link_of, pass_round
from visiontrain.strategies.profile import BlockCost
from visiontrain.strategies.speeds import Staged, Work
from visiontrain.strategies.timeline import orders, play

# A link of 100 bytes per second and 0.1 s; a step of 6 s.
LINK = Link("slow", 0.1, 100.0)
SLOW = Network(LINK)
WORK = Work(
    *(1.0, 4.0, 1.0),
    images=8,
    gradients=800,
    weights=1000,
    gathered=2000,
    message=1200,
    blocks=3,
    low_rank=80,
)


def test_links_are_read_from_their_rates():
    assert link_of("10mbit").bandwidth == 1.25e6
    assert link_of("50mbit@20ms") == Link("50mbit@20ms", 0.02, 6.25e6)
    assert link_of("0.4gbit") == Link("0.4gbit", 5e-3, 5e7)
    assert link_of("400gbit").latency < link_of("10gbit").latency < link_of("10mbit").latency
    assert link_of("nvlink").bandwidth > link_of("400gbit").bandwidth
    for text in ("fast", "10", "0gbit", "10gbit@", "-1gbit", "10 gbit"):
        with pytest.raises(ConfigError, match="links: "):
            link_of(text)


def test_collectives_go_round_in_rings():
    assert pass_round(SLOW, 4, 800) == pytest.approx(3 * (0.1 + 2))
    assert all_reduce(SLOW, 4, 800, 2) == pytest.approx(2 * 3 * (2 * 0.1 + 2))
    assert all_reduce(SLOW, 1, 800) == 0


def test_the_link_within_a_machine_counts_only_where_there_is_one_machine():
    network = Network(LINK, Link("fast", 0.0, 1e6), per_node=4)
    assert all_reduce(network, 4, 800) == pytest.approx(6 * 200 / 1e6)
    assert all_reduce(network, 8, 800) == all_reduce(SLOW, 8, 800)


def test_data_parallel_hides_at_most_its_backward_pass():
    found = speeds.ddp(WORK, SLOW, 4)
    assert found.slowest == pytest.approx(6 + 12.6)
    assert found.fastest == pytest.approx(6 + 12.6 - 4)
    assert found.seconds == pytest.approx((found.slowest + found.fastest) / 2)
    assert found.sent == 2 * 800 * 3 / 4
    assert found.images_per_s == pytest.approx(32 / found.seconds)
    assert found.efficiency == pytest.approx(6 / found.seconds)
    parts = speeds.ddp(replace(WORK, parts=4), SLOW, 4)
    assert parts.slowest - parts.fastest == pytest.approx(1)


def test_what_travels_less_often_or_in_less_counts_less():
    assert speeds.powersgd(replace(WORK, low_rank_s=0.5), SLOW, 4).seconds == pytest.approx(
        6.5 + 6 * (2 * 0.1 + 0.2)
    )
    assert speeds.local_sgd(WORK, SLOW, 4, 10).seconds == pytest.approx(6 + 6 * (0.1 + 3) / 10)
    assert speeds.local_sgd(WORK, SLOW, 4, 10).sent == 2 * 1200 * 0.75 / 10


def test_sharding_gathers_twice_and_scatters_once():
    found = speeds.fsdp(WORK, SLOW, 4)
    assert found.slowest == pytest.approx(6 + 3 * (9 * 0.1 + 7))
    assert found.sent == 2800 * 3 / 4
    gloo = speeds.fsdp(WORK, SLOW, 4, gloo=True)
    assert (gloo.sent, gloo.slowest) == (found.sent, pytest.approx(6 + 3 * (9 * 0.1 + 9)))
    parts = speeds.fsdp(replace(WORK, parts=2), SLOW, 4)
    assert parts.slowest == pytest.approx(6 + 3 * (15 * 0.1 + 12))
    half = speeds.fsdp(replace(WORK, gathered=1000), SLOW, 4)
    assert half.sent == 1800 * 3 / 4


def test_servers_share_what_all_workers_want_at_once():
    one = speeds.parameter_server(WORK, SLOW, 4)
    assert one.seconds == pytest.approx(6 + 0.2 + 4 * (10 + 8))
    assert one.sent == 4000
    # Sixteen have two servers, of which each sends half of the weights to all.
    two = speeds.parameter_server(WORK, SLOW, 16)
    assert two.seconds == pytest.approx(6 + 0.2 + 8 * (10 + 8))
    assert two.sent == 8000


def test_a_round_sends_every_client_a_message_and_back():
    found = speeds.federated(WORK, SLOW, 4, 10)
    assert found.seconds == pytest.approx(6 + 2 * (0.1 + 48) / 10)


def test_sending_delays_stages_one_after_the_other_each_way():
    plans = orders("gpipe", 2, 3)
    alone = play(plans, [1, 1], [2, 2])
    assert alone.seconds == 4 * 3
    # Forward: the last of three messages of 5 s comes at 1 + 15; back: as many, of 7 s.
    slow = play(plans, [1, 1], [2, 2], [(5, 7)])
    assert slow.seconds == (1 + 15 + 1) + (2 + 21 + 2)
    assert slow.busy == alone.busy
    assert play(plans, [1, 1], [2, 2], [(0, 0)]) == alone


def test_pipelines_side_by_side_sum_their_stages():
    alone = play(orders("gpipe", 2, 2), [1, 1], [2, 2])
    slow = play(orders("gpipe", 2, 2), [1, 1], [2, 2], [(1, 1)])
    staged = Staged("pipeline, gpipe", 2, alone, slow, sent=60.0, summed=[800, 200])
    one, four = (speeds.pipeline(WORK, SLOW, devices, staged) for devices in (2, 8))
    assert one.seconds == pytest.approx(slow.seconds + 1)
    assert four.seconds == pytest.approx(one.seconds + all_reduce(SLOW, 4, 400))
    assert four.sent == 60 + 2 * 400 * 3 / 4


@pytest.mark.parametrize(
    ("per_node", "devices", "seconds"),
    [
        (8, 8, 2 * 3 * (600 / 4 / 1e6)),  # one machine: the largest stage, on its fast links
        (4, 8, 2 * 3 * (0.1 + 1000 / 4 / 100)),  # both stages in every machine
        (1, 8, 2 * 3 * (0.1 + 600 / 4 / 100)),  # one device a machine
        (2, 2, 0.0),  # one pipeline
    ],
)
def test_stages_of_one_machine_share_its_link(per_node, devices, seconds):
    alone = play(orders("gpipe", 2, 2), [1, 1], [2, 2])
    staged = Staged("pipeline, gpipe", 2, alone, alone, sent=60.0, summed=[1200, 800])
    network = Network(LINK, Link("fast", 0.0, 1e6), per_node)
    found = speeds.pipeline(WORK, network, devices, staged)
    assert found.seconds == pytest.approx(alone.seconds + 1 + seconds)


def test_a_machine_of_fewer_devices_than_stages_carries_those_that_stand_there():
    alone = play(orders("gpipe", 3, 3), [1] * 3, [2] * 3)
    staged = Staged("pipeline, gpipe", 3, alone, alone, sent=0.0, summed=[200, 400, 800])
    # Machines have stages 0 and 1, 2 and 0, 1 and 2.
    found = speeds.pipeline(WORK, Network(LINK, LINK, 2), 6, staged)
    assert found.slowest == pytest.approx(alone.seconds + 1 + 2 * (0.1 + 600 / 2 / 100))


# -- all modes of a training -----------------------------------------------------------------

MEASURED = replace(WORK, low_rank_s=3.0)  # here
BLOCKS = [
    BlockCost(name, 1.0, 2.0, 8, 8, 0, kept=100, given=50, passed=50, passed_back=50)
    for name in ("stem", "wide", "head")
]
FACTS = Facts(
    costs=BLOCKS,
    images=8,
    loss=0,
    image=3,
    states=2.0,
    average=False,
    recompute=False,
    batch=16,
    accumulate=1,
)


def test_a_step_that_was_measured_elsewhere_scales_all_that_is_computed(monkeypatch):
    monkeypatch.setattr(extrapolation, "work_of", lambda *_: MEASURED)
    run, scale = Run(batch=16), Scale(["nvlink"], [2])
    here, there = (
        {known.mode: known for known in extrapolate(run, 2, scale, FACTS, step).speeds}
        for step in (None, 0.6)
    )
    assert here["ddp, powersgd"].slowest == pytest.approx(6 + 3, rel=1e-3)
    assert there["ddp, powersgd"].slowest == pytest.approx(0.6 + 0.3, rel=1e-3)
    # Of a link that is too slow, backward passes hide 4 s of 6; loss and optimizer none.
    slow = extrapolate(run, 2, Scale(["0.001kbit"], [2]), FACTS, 0.6).speeds
    (ddp,) = [known for known in slow if known.mode == "ddp"]
    assert ddp.slowest - ddp.fastest == pytest.approx(0.4)


def test_pipelines_that_share_gather_weights_and_scatter_gradients(monkeypatch):
    monkeypatch.setattr(extrapolation, "work_of", lambda *_: replace(WORK, images=4))
    facts = replace(FACTS, costs=[replace(BLOCKS[0], trained=0), *BLOCKS[1:]])
    scale, found = Scale(["0.008kbit@10ms"], [4, 6]), {}  # a byte per second
    for sharded in (False, True):
        config = Pipeline(processes=4, data_parallel=2, stages=["head"], sharded=sharded)
        told = extrapolate(Run(batch=16, strategy=config), 4, scale, facts).speeds
        mine = [known for known in told if known.mode.startswith("pipeline")]
        assert [known.devices for known in mine] == [4, 6]
        found[sharded] = mine[0]
        known = forecast.pipeline(facts, 4, "gpipe", [0, 2], 2, sharded=sharded)
        assert mine[0].sent == known.sent
    assert found[True].mode == "pipeline of 2, gpipe, sharded"
    # The first stage: 16 bytes gathered and 8 scattered, or 8 both ways; half of it by each. Of two
    # blocks each is gathered and scattered by itself.
    more = (24 - 16) / 2 + (4 - 2) * 0.01
    assert found[True].seconds - found[False].seconds == pytest.approx(more)


@pytest.mark.parametrize(("mib", "cut"), [(28, "b"), (26, "c"), (17, None)])
def test_the_pipeline_is_that_of_the_table_above(mib, cut, monkeypatch):
    """Less memory moves the cut, and lets no pipeline be."""
    monkeypatch.setattr(extrapolation, "work_of", lambda *_: replace(WORK, images=2))
    weights = 2**20
    costs = [
        BlockCost(name, seconds, 2 * seconds, weights, weights, 0, weights, weights, passed, passed)
        for name, seconds, passed in (("a", 9.0, 1), ("b", 1.0, 2), ("c", 1.0, 3), ("d", 1.0, 4))
    ]
    facts = replace(FACTS, costs=costs, images=1, image=0, average=True, batch=4, accumulate=4)
    monkeypatch.setattr(planning, "facts_of", lambda _: facts)
    config = PlanConfig(
        batch=4,
        accumulate=4,
        devices=2,
        links=["nvlink"],
        counts=[2],
        device="cpu",
        strategy=Pipeline(kind="pipeline", memory=mib / 1024),
    )
    found = planning.plan(config)
    known = [mode.known for mode in found.modes if mode.known.mode == "pipeline, gpipe"]
    predicted = [known for known in found.speeds.speeds if known.mode == "pipeline of 2, gpipe"]
    assert [list(each.stages) for each in known] == ([[cut]] if cut else [])
    assert [each.sent for each in predicted] == [each.sent for each in known]
    assert any(line.startswith("pipeline: strategy.memory: ") for line in found.left_out) != bool(
        cut
    )


# -- published figures ------------------------------------------------------------------------

MILLION = 4e6  # bytes of a million parameters
# Horovod's README of 2017 (images/s of one Pascal GPU with 64 images and of 16 on 4 machines with
# 25 Gbit/s RoCE, gradients summed by NCCL) and docs/benchmarks.rst (scaling efficiency of 512 GPUs
# on 128 such machines); 64 MiB are summed at once. Parameters, in millions, are the models' own.
HOROVOD = {
    "Inception V3": (134.4, 23.8, 2022.6, 0.90),
    "ResNet-101": (119.4, 44.5, 1746.2, 0.90),
    "VGG-16": (130.9, 138.4, 1787.4, 0.68),
}
ROCE = Network(link_of("25gbit"), link_of("nvlink"), per_node=4)


def work_of(seconds, backward, images, size):
    gradients = round(size * MILLION)
    rest = seconds - backward
    return Work(rest, backward, 0.0, images, *[gradients] * 2, 2 * gradients, gradients, blocks=1)


@pytest.mark.parametrize("model", HOROVOD)
def test_horovods_figures_are_met_within_15_percent(model):
    rate, size, on_16, efficiency = HOROVOD[model]
    # A backward pass takes about twice as long as a forward pass.
    work = work_of(64 / rate, 2 / 3 * 64 / rate, 64, size)
    few, many = (speeds.ddp(work, ROCE, devices, bucket=2**26) for devices in (16, 512))
    assert few.images_per_s == pytest.approx(on_16, rel=0.15)
    assert few.fastest < 16 * 64 / on_16 < few.slowest
    assert many.efficiency == pytest.approx(efficiency, rel=0.15)
    assert many.fastest < work.seconds / efficiency < many.slowest


def test_imagenet_in_an_hours_figure_is_met_within_15_percent():
    """Goyal et al. 2017 (arXiv 1706.02677): ResNet-50 on 256 P100 in machines of 8, 50 Gbit/s.

    Sections 4.3 and 5.5: 25 million parameters, 120 ms of backprop; 16 minutes for an epoch of
    1.28 million images on 8 GPUs of 32 images each; about 90 % of that efficiency on 256.
    """
    step = 16 * 60 / (1.28e6 / (8 * 32))
    work = work_of(step, 0.120, 32, 25)
    network = Network(link_of("50gbit"), link_of("nvlink"), per_node=8)
    eight, many = (speeds.ddp(work, network, devices) for devices in (8, 256))
    assert eight.seconds == pytest.approx(step, rel=0.01)
    assert eight.seconds / many.seconds == pytest.approx(0.90, rel=0.15)
    assert eight.seconds / many.slowest < 0.90 < eight.seconds / many.fastest


# -- measured here ----------------------------------------------------------------------------

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def lines_of(name):
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def test_a_pipeline_here_is_as_fast_as_is_predicted_of_equal_stages():
    """tools/stages.py: two processes in 8 micro-batches over one, also in 8."""
    (found,) = (
        row["over_one"] for row in lines_of("pipelines.jsonl") if row.get("kind") == "pipeline"
    )
    line = play(orders("gpipe", 2, 8), [1, 1], [2, 2])
    assert 8 * 6 / line.seconds == pytest.approx(found, rel=0.15)


def test_modes_on_a_slow_link_send_and_take_what_is_predicted_of_their_link(monkeypatch):
    """tools/slow_link on 10 Mbit/s: its measured link and step, the model's bytes."""
    model = build_model(YoloN(norm="group"), 10, "detect")
    monkeypatch.setattr(low_rank, "ROUNDS", 1)  # only bytes are asked for
    size = sum(p.nbytes for p in model.parameters())
    message = sum(model.state_dict()[n].nbytes for n in shared(model, ()).down)
    low = low_rank.low_rank(model, 2).size
    rows = {row["mode"]: row for row in lines_of("links.jsonl")}
    assert rows.keys() == {"ddp", "powersgd", "sync_every=20", "federated"}
    for mode, row in rows.items():
        network = Network(Link("measured", row["latency_s"], row["bytes_per_s"]))
        # How a step divides is not in the rows: a backward pass may hide what it can, or nothing.
        step = row["alone_s"]
        work = Work(0.0, step, 0.0, 4, size, size, 2 * size, message, blocks=1, low_rank=low)
        known = {
            "ddp": speeds.ddp(work, network, 2),
            "powersgd": speeds.powersgd(work, network, 2),
            "sync_every=20": speeds.local_sgd(work, network, 2, 20),
            "federated": speeds.federated(work, network, 2, 20),
        }[mode]
        assert known.sent == pytest.approx(row["bytes"], rel=1e-3), mode
        off = 0.2 if mode == "sync_every=20" else 0.15
        assert known.seconds == pytest.approx(row["measured_s"], rel=off), mode
        if mode in ("sync_every=20", "federated"):  # nothing is unknown
            assert known.seconds == pytest.approx(row["predicted_s"], rel=1e-3)


def test_a_machine_s_link_carries_what_all_its_workers_want():
    node = Network(SLOW.between, Link("inside", 0.0, 1e9), per_node=16)
    apart = speeds.parameter_server(WORK, SLOW, 64)
    assert apart.seconds == pytest.approx(6 + 0.2 + 8 * (10 + 8))
    together = speeds.parameter_server(WORK, node, 64)
    assert together.seconds == pytest.approx(6 + 0.2 + 16 * (10 + 8))
    assert speeds.parameter_server(WORK, node, 16).seconds < 7  # they stay on one machine
