"""Fixtures of all tests."""

import pytest
from pool import Ranks


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
