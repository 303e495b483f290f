"""What ranks tell each other."""

import torch
import torch.distributed as dist

from visiontrain.strategies.comm import subgroup

CPU = torch.device("cpu")


def waits():
    """Return how long all ranks wait for each other, and those of a part."""
    part = subgroup([[0], [1]], CPU)
    groups = dist.group.WORLD, part
    return [group._get_backend(CPU).options._timeout.total_seconds() for group in groups]


def test_parts_of_the_ranks_wait_no_longer_than_all(ranks):
    for everyone, part in ranks(2).run(waits):
        assert everyone == part < 1800  # what torch gives a group that nobody tells
