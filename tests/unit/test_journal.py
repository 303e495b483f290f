"""The running means of an epoch's losses."""

import torch

from visiontrain.engine.journal import Meter, Pace

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


def test_the_pace_leaves_out_what_it_is_told_to():
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.begin()
    now[0] = 1.0
    pace.fetched()
    now[0] = 10.0
    pace.leave_out(5.0)
    assert pace.done(20) == 5.0
    assert pace.epoch() == {"images_per_s": 4.0, "data_wait": 0.2}
