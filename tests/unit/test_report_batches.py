"""What stands above pictures of training batches."""

import pytest
import torch

from visiontrain.core.types import Batch
from visiontrain.report.pictures import _of_batch


@pytest.mark.parametrize(
    ("mixed", "title"),
    [
        ([(1, 1.0)], "dog"),
        ([(0, 0.7), (1, 0.3)], "cat 0.7, dog 0.3"),
        ([(0, 0.7), (0, 0.3)], "cat"),  # both pictures show a cat
        ([(2, 0.6), (3, 0.4)], "longlon\u2026onglong 0.6, longlon\u2026onglong 0.4"),
    ],
)
def test_shares_of_mixed_pictures_add_up_by_class(mixed, title):
    targets = torch.tensor([[[k, 0, 0, 8, 8, weight] for k, weight in mixed]])
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    batch = Batch(images, targets, torch.arange(1), torch.zeros(1, 5), torch.ones(1))
    names = ["cat", "dog", "long" * 10, "long" * 11]
    assert _of_batch(batch, 0, names).title == title
