"""What powersgd is said to cost: its bytes are those that it sums."""

from torch import nn

from visiontrain.strategies.low_rank import low_rank


def test_bytes_are_those_of_both_matrices_and_of_what_travels_whole():
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Linear(4, 4))
    found = low_rank(model, 2)
    # (64, 144) becomes (64, 2) and (144, 2); biases and the small matrix stay as they are.
    assert found.size == 4 * (2 * (64 + 144) + 64 + 16 + 4)
    assert found.seconds > 0
    model[0].requires_grad_(requires_grad=False)
    assert low_rank(model, 2).size == 4 * (16 + 4)
