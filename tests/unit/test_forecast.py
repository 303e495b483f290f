"""What modes are foretold to need, on blocks whose costs are round numbers."""

from dataclasses import replace

import pytest

from visiontrain.strategies.forecast import Facts, ddp, fsdp, pipeline, single
from visiontrain.strategies.profile import BlockCost

# Bytes, of two images: a stem of 8 in weights that keeps 100, a wide block, a head.
STEM = BlockCost("stem", 1.0, 2.0, 8, 8, 2, kept=100, given=50, passed=50, passed_back=50)
WIDE = BlockCost("wide", 1.0, 2.0, 80, 80, 2, kept=200, given=60, passed=60, passed_back=60)
HEAD = BlockCost("head", 2.0, 4.0, 40, 40, 0, kept=40, given=10, passed=10, passed_back=10)
FACTS = Facts(
    costs=[STEM, WIDE, HEAD],
    images=2,
    loss=20,
    image=3,
    states=2.0,
    average=True,
    recompute=False,
    batch=8,
    accumulate=1,
    base=1000,
)
WEIGHTS, KEPT = 128, 340


def test_one_process_holds_all_of_it():
    (need,) = single(FACTS).needs
    assert (need.weights, need.optimizer, need.average) == (WEIGHTS + 4, 2 * WEIGHTS, WEIGHTS + 4)
    # The most is there when the wide block's backward pass begins: what it and the stem keep,
    # the gradient of its output, that of the head's weights, and the images.
    assert need.gradients == 40
    assert need.activations == 4 * (300 + 60) + 8 * 3
    parts = (need.weights, need.gradients, need.optimizer, need.average, need.activations)
    assert need.tensors == sum(parts)
    assert need.resident == 1000 + round(1.1 * need.tensors)


def test_gradients_count_where_they_outweigh_what_is_kept():
    heavy = replace(FACTS, costs=[STEM, replace(WIDE, trained=4000), HEAD])
    (need,) = single(heavy).needs
    assert need.gradients == 4040  # while the stem's activations are still there
    assert need.activations == 4 * (100 + 50) + 8 * 3


def test_the_loss_counts_where_it_makes_more_than_any_backward_pass():
    (need,) = single(replace(FACTS, loss=500)).needs
    assert (need.gradients, need.activations) == (0, 4 * (KEPT + 500) + 8 * 3)


def test_parts_of_a_batch_keep_less_beside_all_gradients():
    (need,) = single(replace(FACTS, accumulate=4)).needs
    assert need.gradients == WEIGHTS
    assert need.activations == KEPT + 20 + 8 * 3


def test_what_is_computed_again_is_kept_of_one_block_only():
    (need,) = single(replace(FACTS, recompute=True)).needs
    assert need.activations == 4 * ((50 + 60) + (200 - 60) + 60) + 8 * 3


def test_data_parallel_shares_images_and_sends_gradients_twice():
    known = ddp(FACTS, 4)
    (need,) = known.needs
    assert need.activations == KEPT + 20 + 2 * 3
    assert need.weights == WEIGHTS + 4
    assert need.gradients == 40 + WEIGHTS  # the head's, and torch's buckets for all
    assert known.sent == 2 * WEIGHTS * 3 // 4


def test_sharding_divides_what_stays_but_not_what_is_at_work():
    (need,) = fsdp(FACTS, 4).needs
    assert (need.weights, need.optimizer) == (WEIGHTS // 4 + 4, 2 * WEIGHTS // 4)
    # At the head's backward pass: its own weights, and the wide block's in both places.
    assert need.activations == KEPT + 10 + 2 * 3 + 40 + 2 * 80


@pytest.mark.parametrize(("schedule", "held"), [("gpipe", (4, 4)), ("1f1b", (2, 1))])
def test_stages_hold_the_micro_batches_that_their_schedule_lets_in(schedule, held):
    known = pipeline(replace(FACTS, accumulate=4), 2, schedule, [0, 2])
    first, last = known.needs
    assert (first.weights, last.weights) == (88 + 4, 40)
    # Every process reads all images; the engine keeps places for what comes from either side.
    assert first.activations == held[0] * 300 + 4 * 60 + 8 * 3
    assert last.activations == held[1] * 40 + 4 * 60 + 20 + 8 * 3
    assert known.sent == 4 * 60  # forwards from the first, gradients back from the last
    assert known.stages == ["head"]
    assert known.bubble > 0


def test_pipelines_side_by_side_share_images_and_sum_gradients():
    one = pipeline(replace(FACTS, accumulate=2), 2, "gpipe", [0, 2])
    two = pipeline(replace(FACTS, accumulate=2), 4, "gpipe", [0, 2], copies=2)
    assert two.needs[1].activations < one.needs[1].activations
    assert two.sent == 2 * 60 + 2 * 88 // 2


def test_pipelines_that_share_what_they_hold_gather_it_for_a_step():
    facts = replace(FACTS, accumulate=2)
    plain = pipeline(facts, 4, "gpipe", [0, 2], copies=2).needs
    known = pipeline(facts, 4, "gpipe", [0, 2], copies=2, sharded=True)
    for whole, shared, weights in zip(plain, known.needs, (88, 40), strict=True):
        assert (shared.optimizer, shared.average) == (weights, shared.weights)
        assert shared.weights == whole.weights - weights // 2
        assert shared.activations == whole.activations + weights
    assert known.sent == 2 * 60 + 88 // 2 + 88 // 2


def test_half_precision_halves_what_is_gathered():
    whole, half = fsdp(FACTS, 4), fsdp(replace(FACTS, gather=0.5), 4)
    assert whole.needs[0].activations - half.needs[0].activations == (40 + 2 * 80) // 2
    assert (whole.sent, half.sent) == (3 * WEIGHTS * 3 // 4, 2 * WEIGHTS * 3 // 4)


def test_blocks_that_do_not_train_are_gathered_once():
    frozen = replace(FACTS, costs=[replace(STEM, trained=0), WIDE, HEAD], gather=0.5)
    assert frozen.gathered == (8 + 2 * 80 + 2 * 40) / 2
    assert fsdp(replace(frozen, accumulate=2), 4).sent == (2 * 124 + 120) * 3 // 4


def test_what_does_not_fit_is_told():
    known = single(FACTS)
    need = known.needs[0].resident
    assert known.fits(need)
    assert not known.fits(need - 1)
