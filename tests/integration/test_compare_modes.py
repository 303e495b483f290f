"""Comparisons of modes that drive others, of seeds and settings, and through kills."""

import json
import os
import re
import signal
import subprocess
import sys

import clients
import pytest
import threads
from small import digests
from test_compare import SMALL, compare, fails

from visiontrain import cli, commands
from visiontrain.strategies import registry

LIGHT = {"model": {"kind": "yolo_n", "norm": "group"}, "check": False}


@pytest.fixture
def here(monkeypatch):
    """Let workers, servers and clients be threads and calls of this process."""
    monkeypatch.setitem(registry.DRIVERS, "parameter_server", threads.driver_of([]))
    monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([]))


def test_modes_that_drive_others_have_rows_with_figures_of_their_own(here, tmp_path):
    modes = ("single", "placement", "parameter_server:sync=ssp+staleness=3", "federated:clients=2")
    found = compare(tmp_path / "run", *modes, epochs=2, **LIGHT)
    assert [row.error for row in found.rows] == [None] * 5
    rows = {row.strategy["kind"]: row for row in found.rows}
    server, shared, alone = rows["parameter_server"], rows["federated"], rows["client"]
    assert {row.initial_sha256 for row in found.rows} == {found.initial_sha256}
    assert {row.samples for row in found.rows if row is not alone} == {24}
    assert server.staleness is not None
    assert {"communication", "waiting", "compute_data"} <= server.split.keys()
    assert (shared.rounds, shared.bytes_received > 10**6) == (2, True)
    assert sum(client["images"] for client in shared.trials[0].clients.values()) == 12
    assert (alone.name, alone.samples, alone.exactness) == ("alone-clients=2", 12, "one device")
    assert "is the best of 2 on the val split" in alone.reasons[0]
    assert (tmp_path / "run" / "alone-clients=2-number=1" / "metrics.json").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 4 * 6  # labels and five rows
    assert "Who has which images" in page


def test_seeds_and_modes_are_added_without_repeating_what_is_done(tmp_path, monkeypatch):
    first = compare(tmp_path, "single", **LIGHT)
    train, done = commands.train, []
    monkeypatch.setattr(commands, "train", lambda run: done.append(run.out) or train(run))
    runs = [{"batch": 2, "name": "small"}]
    found = compare(tmp_path, resume=True, seeds=[0, 1], runs=runs)
    names = ["single-seed=1", "small-seed=0", "small-seed=1"]
    assert done == [str(tmp_path / name) for name in names]
    assert found.rows[0].trials[0].scores == first.rows[0].scores
    assert [trial.folder for trial in found.rows[0].trials] == ["single", "single-seed=1"]
    assert (found.rows[0].spread is None, found.rows[1].steps) == (False, 6)
    assert "±" in str(found)
    monkeypatch.setattr(commands, "train", fails)
    again = compare(tmp_path, resume=True, links=["1gbit"], counts=[8])
    assert again.rows[1].scores == found.rows[1].scores
    predicted = json.loads((tmp_path / "compare.json").read_text())["predicted"]
    assert predicted["step_s"] == pytest.approx(4 / found.rows[0].images_per_s)
    ddp = next(speed for speed in predicted["speeds"] if speed["mode"] == "ddp")
    assert ddp["devices"] == 8
    assert ddp["images_per_s"] == pytest.approx(32 / ddp["seconds"])
    assert "predicted, not measured: images/s" in str(again)
    page = (tmp_path / "report.html").read_text()
    assert "Predicted for more devices, not measured" in page
    assert re.search(rf">[\d,.]+( \([\d,.]+ to [\d,.]+\))?, {ddp['efficiency']:.0%}<", page)


def test_equal_time_gives_each_mode_the_epochs_that_fit(tmp_path):
    found = compare(
        tmp_path / "run", "single", runs=[{"batch": 2}], budget="seconds", epochs=2, **LIGHT
    )
    assert [row.error for row in found.rows] == [None, None]
    assert (tmp_path / "run" / "pace" / "batch=2" / "metrics.json").is_file()
    control, other = found.rows
    assert control.samples == 24
    assert other.samples % 12 == 0
    again = compare(tmp_path / "run", resume=True)
    assert again.rows[1].samples == other.samples


def test_a_kill_in_the_midst_of_a_run_costs_nothing_that_was_saved(tmp_path):
    words = [*SMALL, "strategies=single", "check=false", "epochs=3", "save.every_steps=1"]
    assert cli.main(["compare", *words, f"out={tmp_path}/whole"]) == 0
    cut = tmp_path / "cut"
    dies = (
        "import os, signal; from visiontrain import cli; from visiontrain.engine import trainer\n"
        "step = trainer.train_step\n"
        "def dying(learner, *rest):\n"
        "    if learner.step == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(learner, *rest)\n"
        "trainer.train_step = dying\n"
        "import sys; cli.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", dies, "compare", *words, f"out={cut}"]
    killed = subprocess.run(command, env=dict(os.environ), capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (cut / "single" / "metrics.json").exists()
    assert cli.main(["compare", f"out={cut}", "resume=true"]) == 0
    assert digests(cut / "single") == digests(tmp_path / "whole" / "single")
    assert not (cut / "single" / "whole.json").exists()  # how long all of it took is not known
