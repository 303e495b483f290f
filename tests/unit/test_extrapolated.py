"""Predictions as people see them, and what a comparison makes them from."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from visiontrain import comparison
from visiontrain.extrapolation import Scale
from visiontrain.recipe import Run
from visiontrain.report.extrapolated import Extrapolation, section
from visiontrain.report.rows import Row
from visiontrain.strategies.config import DDP, Single
from visiontrain.strategies.speeds import Speed

SCALE = Scale(["1gbit"])


def speed(mode, devices, seconds, slowest, fastest):
    images = 4 * devices / seconds
    return Speed(mode, "1gbit", devices, seconds, slowest, fastest, images, 0.5, 1e6)


MADE = Extrapolation(
    4,
    0.1,
    "that of single",
    1,
    [
        speed("ddp", 8, 0.2, 0.4, 0.1),
        speed("ddp", 512, 0.2, 0.4, 0.1),
        speed("pipeline of 4, interleaved_1f1b, sharded", 8, 0.5, 0.5, 0.5),
    ],
)


def test_columns_stand_below_each_other_whatever_modes_are_called():
    first, *table = MADE.lines()
    assert first.startswith("predicted, not measured: ")
    assert first.endswith("from 0.1 s a step of one (that of single)")
    assert len({len(line) for line in table}) == 1
    assert table[1].split() == ["ddp", "160", "50%", "10,200", "50%"]
    assert table[2].split()[-3:] == ["64", "50%", "-"]


def test_a_page_shows_bounds_where_something_could_hide():
    page = "".join(map(str, flat(section(MADE))))
    assert "160 (80 to 320), 50%" in page
    assert "64, 50%" in page
    assert section(None) is None


def flat(content):
    for part in content:
        if isinstance(part, list):
            yield from flat(part)
        else:
            yield part


@pytest.mark.parametrize(
    ("strategy", "images_per_s", "pace"),
    [(Single(), 80.0, 0.2), (DDP(processes=2), 80.0, None), (Single(), None, "none")],
)
def test_the_pace_is_the_controls_where_that_is_one_device(
    strategy, images_per_s, pace, monkeypatch
):
    asked, said = [], []
    monkeypatch.setattr(comparison, "extrapolate", lambda *given: asked.append(given) or MADE)
    series = SimpleNamespace(say=said.append, attempt=lambda _, action: action())
    run = Run(strategy=strategy)
    entry = SimpleNamespace(jobs=[SimpleNamespace(run=run)])
    row = Row("control", {"kind": "single"}, images_per_s=images_per_s)
    made = comparison._predicted(series, entry, row, SCALE)
    if pace == "none":
        assert (made, asked) == (None, [])
        assert said == ["links: control has no speed, so nothing can be predicted"]
    else:
        ((alone, devices, scale, _, step_s, source),) = asked
        assert (alone.strategy, devices, scale) == (Single(), 1, replace(SCALE, gloo=True))
        assert (made, step_s, source) == (MADE, pace, "that of control")


def test_predictions_that_fail_leave_the_comparison_whole():
    series = SimpleNamespace(say=None, attempt=lambda what, _: f"{what} could not be")
    entry = SimpleNamespace(jobs=[SimpleNamespace(run=Run())])
    row = Row("control", {"kind": "single"}, images_per_s=1.0)
    assert comparison._predicted(series, entry, row, SCALE) is None
