"""Fixtures of all tests."""

import pytest
import torch
from pool import Ranks


@pytest.fixture
def one_thread():
    """Compute as each of the ranks does: sums are rounded otherwise on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ranks():
    """Return `get(world)`: a pool of that many ranks (gloo, one thread each), made once.

    A pool in which a test failed is replaced: its ranks may wait for each other.
    """
    pools: dict[int, Ranks] = {}

    def get(world):
        if world not in pools or not pools[world].alive:
            pools[world] = Ranks(world)
        return pools[world]

    yield get
    for pool in pools.values():
        pool.close()
