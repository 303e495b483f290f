"""Robust rules on plain tensors: what one wrong rank can do, and what it cannot."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from visiontrain.core.errors import ConfigError
from visiontrain.strategies.aggregate import AGGREGATES
from visiontrain.strategies.config import DDP, check_ranks, check_votes, least_ranks

ROBUST = sorted(AGGREGATES.keys() - {"mean"})
WRONG = {
    "reversed": lambda row: -10 * row,
    "huge": lambda row: row + 1e30,
    "nan": lambda row: row * torch.nan,
    "inf": lambda row: row - torch.inf,
}


def gradients(world, seed, size=(40, 3)):
    """Make honest gradients (W, N) in parts: one direction, and noise as large."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(world, sum(size), generator=generator, dtype=torch.float64)
    common = torch.randn(sum(size), generator=generator, dtype=torch.float64)
    return list((common + noise).split(size, dim=1))


@pytest.mark.parametrize("name", sorted(AGGREGATES))
def test_equal_gradients_stay_as_they_are(name):
    parts = [rows[:1].expand(5, -1) for rows in gradients(5, 0)]
    for rows, made in zip(parts, AGGREGATES[name](parts, 1), strict=True):
        torch.testing.assert_close(made, rows[0])


@pytest.mark.parametrize("name", sorted(AGGREGATES))
@given(seed=st.integers(0, 1000), world=st.integers(5, 7))  # of 4, krum's nearest two are equal
def test_the_order_of_ranks_does_not_matter(name, seed, world):
    parts = gradients(world, seed)
    order = torch.randperm(world, generator=torch.Generator().manual_seed(seed))
    mixed = AGGREGATES[name]([rows[order] for rows in parts], 1)
    for one, other in zip(AGGREGATES[name](parts, 1), mixed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wrong", sorted(WRONG))
@pytest.mark.parametrize("name", ROBUST)
@given(seed=st.integers(0, 1000), world=st.integers(4, 7), rank=st.integers(0, 3))
def test_one_wrong_rank_moves_nothing_out_of_the_honest_ones(name, wrong, seed, world, rank):
    parts = gradients(world, seed)
    honest = [torch.cat([rows[:rank], rows[rank + 1 :]]) for rows in parts]
    for rows in parts:
        rows[rank] = WRONG[wrong](rows[rank])
    for rows, made in zip(honest, AGGREGATES[name](parts, 1), strict=True):
        assert (made >= rows.min(0).values).all()
        assert (made <= rows.max(0).values).all()


def test_the_mean_is_moved_anywhere():
    rows = torch.ones(4, 2)
    rows[3] = -10
    assert AGGREGATES["mean"]([rows], 1)[0].tolist() == [-1.75, -1.75]


def test_krum_takes_one_whole_gradient():
    parts = gradients(5, 1)
    made = torch.cat(AGGREGATES["krum"](parts, 1))
    assert (made == torch.cat(parts, dim=1)).all(dim=1).sum() == 1


def test_krum_takes_the_one_with_the_nearest_neighbours():
    rows = torch.tensor([[0.0, 0.0], [4.0, 0.0], [4.5, 0.0], [5.0, 0.0], [20.0, 0.0]])
    assert AGGREGATES["krum"]([rows], 1)[0].tolist() == [4.5, 0.0]


@pytest.mark.parametrize("name", ROBUST)
def test_the_least_number_of_ranks_is_where_a_rule_begins_to_hold(name):
    least = least_ranks(name, 1)
    parts = [torch.ones(least, 2)]
    parts[0][0] = 1e6
    assert AGGREGATES[name](parts, 1)[0].tolist() == [1, 1]


def test_too_few_ranks_and_ranks_without_an_image_are_refused():
    check_votes(DDP(), 1, 0)
    check_votes(DDP(aggregate="krum"), 4, 4)
    with pytest.raises(ConfigError, match=r"median on 2; it takes 3 processes or more$"):
        check_votes(DDP(aggregate="median"), 2, 8)
    with pytest.raises(ConfigError, match=r"krum on 4; it takes 6 .* while strategy.faulty=2$"):
        check_votes(DDP(aggregate="krum", faulty=2), 4, 8)
    with pytest.raises(ConfigError, match="batch: 3 in a micro-batch for 4 processes"):
        check_votes(DDP(aggregate="median"), 4, 3)


def test_what_takes_other_processes_or_groups_is_refused_without_them():
    check_ranks(DDP(), 1)
    check_ranks(DDP(topology="hierarchical", inner=2, compress="fp16"), 4)
    check_ranks(DDP(compress="fp16"), 1, fixed=False)
    with pytest.raises(ConfigError, match=r"^strategy.compress: fp16 in one process, "):
        check_ranks(DDP(processes=1, compress="fp16"), 1)
    with pytest.raises(ConfigError, match=r"^strategy.sync_every: 4 in one process, "):
        check_ranks(DDP(processes=1, sync_every=4), 1)
    for world, keys in ((2, {}), (4, {"inner": 3}), (4, {"inner": 4}), (4, {"inner": 1})):
        with pytest.raises(ConfigError, match=rf"^strategy.topology: hierarchical with {world} "):
            check_ranks(DDP(topology="hierarchical", **keys), world)
