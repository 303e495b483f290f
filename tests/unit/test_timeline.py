"""When a pipeline's processes work and wait, by its schedule alone."""

import pytest

from visiontrain.strategies.stage import PER_PROCESS, owner
from visiontrain.strategies.timeline import orders, play

SIZES = [(2, 2), (2, 6), (2, 8), (4, 4), (4, 8)]


def line(schedule, depth, micro, forward=1.0, backward=2.0):
    count = PER_PROCESS[schedule] * depth
    return play(orders(schedule, depth, micro), [forward] * count, [backward] * count)


@pytest.mark.parametrize("schedule", sorted(PER_PROCESS))
@pytest.mark.parametrize(("depth", "micro"), SIZES)
def test_every_micro_batch_passes_every_stage_both_ways_where_it_lies(schedule, depth, micro):
    plans = orders(schedule, depth, micro)
    for rank, plan in enumerate(plans):
        assert all(owner(stage, schedule, depth) == rank for _, stage, _ in plan)
    done = sorted(action for plan in plans for action in plan)
    halves = "IW" if schedule in ("zero_bubble", "zbv") else "B"
    cells = [(s, m) for s in range(PER_PROCESS[schedule] * depth) for m in range(micro)]
    assert done == sorted((way, *cell) for way in f"F{halves}" for cell in cells)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("depth", "micro"), SIZES)
def test_equal_stages_wait_as_the_formula_says(schedule, depth, micro):
    """(K - 1) / (M + K - 1) of Huang et al. 2019 (GPipe), which 1F1B shares."""
    want = (depth - 1) / (micro + depth - 1)
    assert line(schedule, depth, micro).bubble == pytest.approx(want)


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zero_bubble", "zbv"])
def test_two_stages_a_process_wait_less(schedule):
    assert line(schedule, 4, 8).bubble < 0.7 * line("1f1b", 4, 8).bubble


@pytest.mark.parametrize(("depth", "micro"), SIZES)
def test_gpipe_holds_all_micro_batches_and_1f1b_as_many_as_stages_are_left(depth, micro):
    assert line("gpipe", depth, micro).held == [micro] * depth
    assert line("1f1b", depth, micro).held == [min(micro, depth - s) for s in range(depth)]


def test_the_slowest_stage_sets_the_pace():
    plans = orders("gpipe", 2, 4)
    even, uneven = play(plans, [1, 1], [1, 1]), play(plans, [0.5, 1.5], [0.5, 1.5])
    assert even.seconds == 2 * (4 + 1)
    assert uneven.seconds == 2 * (0.5 + 4 * 1.5)
    assert uneven.busy == [4.0, 12.0]
