"""The plot of what parameter servers did."""

from __future__ import annotations

import numpy as np
import pytest

from visiontrain.report import server_plots
from visiontrain.strategies.parameter_server.figures import Report, Totals


def corners(bar):
    return (*bar.get_xy(), bar.get_width(), bar.get_height())


@pytest.fixture
def bars(monkeypatch, tmp_path):
    """Draw totals; return the bars of both panels as (x, y, width, height), and the file."""

    def drawn(totals):
        found = []

        def keep(figure, path):
            found.extend([corners(bar) for bar in axes.patches] for axes in figure.axes)
            return save(figure, path)

        save = server_plots.save
        monkeypatch.setattr(server_plots, "save", keep)
        path = server_plots.servers_plot(totals.summary(), tmp_path / "servers.png")
        return *map(np.array, found), path

    return drawn


def test_bars_are_shares_of_updates_and_seconds_of_workers(bars):
    totals = Totals()
    for name, ages in {"worker 1": (0, 0, 2), "worker 0": (1,)}.items():
        for age in ages:
            report = Report({}, {}, 4, staleness=age, waited=1.0, worked=5.0, exchanged=2.0)
            totals.add(name, report)
    ages, times, path = bars(totals)
    np.testing.assert_allclose(ages[:, 3], [50, 25, 25])
    # Computing, reading and pushing, waiting: of worker 0, then of worker 1.
    np.testing.assert_allclose(times[:, 2], [3, 9, 2, 6, 1, 3])
    np.testing.assert_allclose(times[:, 0], [0, 0, 3, 9, 5, 15])
    assert path.stat().st_size > 5000
    assert Totals.of(totals.summary()).summary() == totals.summary()


def test_very_old_gradients_share_a_bar_and_none_at_all_is_no_error(bars):
    totals = Totals()
    for age in (3, 20, 21, 500):
        totals.add("worker 0", Report({}, {}, 4, staleness=age))
    ages, _, _ = bars(totals)
    np.testing.assert_allclose(ages[[3, 20], 3], [25, 75])
    assert len(ages) == 21
    ages, times, _ = bars(Totals())
    assert not ages[:, 3].any()
    assert not len(times)
