"""The running means of an epoch's losses."""

import torch

from visiontrain.engine.journal import Meter

CPU = torch.device("cpu")


def test_means_go_on_after_a_look_and_after_resume():
    meter = Meter(CPU)
    meter.add({"loss": torch.tensor(1.0)})
    assert meter.epoch(over=False) == {"loss": 1.0}  # a part of an epoch
    other = Meter(CPU)
    other.load_state(meter.state())
    other.add({"loss": torch.tensor(4.0)})
    assert other.epoch() == {"loss": 2.5}
    other.add({"loss": torch.tensor(4.0)})
    assert other.epoch() == {"loss": 4.0}


def test_a_run_that_goes_on_with_another_loss_begins_its_means_anew():
    meter = Meter(CPU)
    meter.add({"o2m/box": torch.tensor(1.0), "o2m/cls": torch.tensor(1.0)})
    other = Meter(CPU)
    other.load_state(meter.state())
    other.add({"all/loss": torch.tensor(2.0)})
    assert other.epoch() == {"all/loss": 2.0}
