"""Fixtures of all tests."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from pool import Ranks, be_process

from visiontrain.strategies import launch
from visiontrain.strategies.config import Alone

settings.register_profile("untimed", deadline=None)  # properties hold on a busy machine, too
settings.load_profile("untimed")


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


@pytest.fixture(scope="session")
def on_ranks(ranks):
    """Return a `launch.run` whose processes are ranks that live already."""
    start = launch.run

    def run(mode, device, entry, text, objects=None):
        if isinstance(mode, Alone):
            return start(mode, device, entry, text, objects or {})
        codes = ranks(mode.processes).run(be_process, mode, entry, text, objects or {}, Path.cwd())
        assert len(set(codes)) == 1
        return codes[0]

    return run


@pytest.fixture
def living(on_ranks, monkeypatch):
    """Let modes take ranks that live already, where starting processes is not the point.

    A process that is started takes seconds to import what it needs.
    """
    monkeypatch.setattr(launch, "run", on_ranks)
