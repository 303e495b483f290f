"""What a comparison makes of its runs: means, noise, verdicts, and which run is the same."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import comparisons
import pytest
import torch
from comparisons import row_of

from visiontrain import series
from visiontrain.compare_config import USES, CompareConfig, modes, seeds
from visiontrain.comparison import _left_out, planned
from visiontrain.core.config import from_keys
from visiontrain.core.durable import digest_of
from visiontrain.core.errors import ConfigError
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.trace import Trace
from visiontrain.prepare import config_sha256, config_text
from visiontrain.report.compare import Comparison
from visiontrain.report.related import related
from visiontrain.report.rows import Row, Trial, measured, together
from visiontrain.report.whole import note_whole, whole_of, with_restarts
from visiontrain.strategies.config import Client, Single
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.keeping import check_same_clients

SMALL = {"data": {"source": "tiny", "train_images": 12, "val_images": 4}, "imgsz": 64, "batch": 4}


def test_a_difference_counts_when_chance_does_not_explain_it():
    control = row_of("single", "single", [0.50, 0.52, 0.54])  # s = 0.02
    near, far = row_of("near", "ddp", [0.55, 0.55]), row_of("far", "ddp", [0.57, 0.57])
    restless = row_of("restless", "ddp", [0.54, 0.60])  # s = 0.042, more than the control's
    assert related([control, restless])[1].word == "within noise"
    assert related([control, restless])[1].noise > 2 * 0.02 * math.sqrt(1 / 3 + 1 / 2)
    one, two, three = related([control, near, far])
    bound = 2 * 0.02 * math.sqrt(1 / 3 + 1 / 2)
    assert (one.word, one.noise) == (None, None)
    assert two.noise == pytest.approx(bound)
    assert (two.word, three.word) == ("within noise", "better")
    assert related([control, row_of("low", "ddp", [0.1])])[1].word == "worse"
    alone = related([row_of("single", "single", [0.5]), far])
    assert alone[1].word == "one seed"  # whatever the other has


def test_efficiency_counts_the_cores_of_both_rows_and_of_gpus_the_processes():
    control = row_of("single", "single", [0.5], threads=2)  # all cores of the machine
    both = row_of("ddp", "ddp", [0.5], rate=9.0, processes=2, threads=1)  # likewise
    assert [related([control, both], cores=c)[1].efficiency for c in (True, False)] == [0.9, 0.45]


def test_the_control_is_the_row_of_one_device_wherever_it_stands():
    first, second = related([row_of("a", "ddp", [0.4]), row_of("b", "single", [0.5])])
    assert first.difference == pytest.approx(-0.1)
    assert (second.difference, first.speedup) == (0, 1)


def test_a_seed_that_failed_is_told_and_the_others_count():
    trials = [
        Trial("a", 0, scores={"map": 0.5}),
        Trial("a", 1, error="boom"),
        Trial("a", 2, scores={"map": 0.7}),
    ]
    row = together(Row("a", {"kind": "ddp"}), trials)
    assert (row.error, list(row.seeds), row.score) == ("seed 1: boom", [0, 2], pytest.approx(0.6))
    assert row.spread == pytest.approx(math.sqrt(0.02))


def test_time_is_split_as_far_as_a_mode_measures_it():
    def split(mode, **keys):
        metrics = comparisons.metrics_of(mode, 50.0, 1, 0.5, 0) | keys
        trial = measured(Trial("a", 0), metrics, comparisons.epochs_of(50.0, 1, 0.5), 25.0)
        assert sum(trial.split.values()) == pytest.approx(25)
        return {key: round(value, 6) for key, value in trial.split.items()}

    assert split("single") == {"compute": 14.4, "data": 1.6, "scoring": 3, "starting": 6}
    assert split("ddp")["compute_communication"] == 14.4
    servers = split("parameter_server")
    assert (servers["communication"], servers["waiting"]) == (3.2, 1.6)
    assert split("federated")["rounds"] == 2.5
    assert (
        "starting" not in measured(Trial("a", 0), comparisons.metrics_of("ddp", 9, 1, 1, 0)).split
    )


def test_the_best_client_is_chosen_for_each_seed():
    def trial(number, seed, score, error=None):
        return Trial(f"alone-number={number}", seed, scores={"map": score}, error=error)

    best, reasons = series.best_of([trial(0, 0, 0.3), trial(1, 0, 0.4)], 2)
    assert [one.name for one in best] == ["alone-number=1"]
    assert reasons == ["seed 0: client 1 is the best of 2 on the val split: 0.300, 0.400"]
    best, reasons = series.best_of([trial(0, 0, 0.3), trial(1, 0, 0.0, "boom")], 2)
    assert (best[0].error, reasons) == ("alone-number=1: boom", [])


def test_as_many_epochs_are_given_as_fit_into_a_time():
    one = {"samples": 100, "train_images_per_s": 10.0, "seconds": 14.0}  # 10 s, scored twice in 4
    assert series.units_in(10 * 12 + 2, one) == 10
    assert series.units_in(1, one) == 1


def test_what_one_step_did_can_be_kept(tmp_path):
    gradient = torch.ones(3)  # of the first step, which is the last
    trace = Trace([], [], [], [1.0], {"first/a": gradient, "last/a": gradient})
    trace.save(tmp_path)
    assert Trace.load(tmp_path).tensors["last/a"].tolist() == [1, 1, 1]


# -- what is asked for ------------------------------------------------------------------


def asked(**keys):
    return from_keys(CompareConfig, {**SMALL, "device": "cpu", **keys}, None, USES)


def test_any_key_may_vary_and_equal_runs_are_refused():
    config = asked(
        strategies=["single"],
        runs=[{"batch": 2}, {"strategy": "ddp", "optim.lr": 0.1, "name": "a b"}],
        seeds=[0, 1],
    )
    entries = planned(config)
    assert [entry.mode.name for entry in entries] == ["single", "batch=2", "a-b"]
    runs = [job.run for entry in entries for job in entry.jobs]
    assert [(run.batch, run.seed) for run in runs] == [
        (4, 0),
        (4, 1),
        (2, 0),
        (2, 1),
        (4, 0),
        (4, 1),
    ]
    assert (runs[4].optim.lr, runs[4].strategy.kind) == (0.1, "ddp")
    assert len({job.start for entry in entries for job in entry.jobs}) == 2  # by seed alone
    with pytest.raises(ConfigError, match="strategies: batch=4 is single again; leave it out"):
        planned(asked(strategies=["single"], runs=[{"batch": 4}]))
    with pytest.raises(ConfigError, match=r"runs: seed: 1; it would change nothing here"):
        modes(asked(runs=[{"seed": 1}]))
    with pytest.raises(ConfigError, match="seeds: 1 stands there twice"):
        seeds(asked(seeds=[1, 1]))
    with pytest.raises(ConfigError, match="seed: 5 beside seeds"):
        seeds(asked(seed=5, seeds=range(2)))


def test_names_of_folders_are_no_longer_than_file_systems_take():
    keys = {"data.source": "x" * 300, "optim.lr": 0.1}
    one, other = modes(asked(runs=[keys, {**keys, "optim.lr": 0.2}]))
    assert one.name != other.name
    for mode in (one, other):
        assert mode.name.startswith("data.source=xxx")
        assert len(mode.name.encode()) < 200


def test_every_run_sees_as_many_samples_unless_told_otherwise():
    half = {"data.fraction": 0.5}

    def epochs(**keys):
        entries = planned(asked(strategies=["single"], epochs=4, **keys))
        return [entry.jobs[0].run.epochs for entry in entries]

    assert epochs(runs=[half]) == [4, 8]
    assert epochs(runs=[half], budget="epochs") == [4, 4]
    assert epochs(runs=[{**half, "epochs": 3}]) == [4, 3]
    some = {"strategy": {"kind": "federated", "clients": 4, "fraction": 0.5, "local_epochs": 2}}
    assert epochs(runs=[some], alone=False) == [4, 8]


def test_federated_brings_its_clients_alone_once_for_each_dealing():
    text = ["single", "federated:clients=2", "federated:clients=2+algorithm=fedprox"]
    entries = planned(asked(strategies=text, epochs=2))
    assert [entry.mode.name for entry in entries[3:]] == ["alone-clients=2"]
    assert [entry.alone for entry in entries] == ["", *["alone-clients=2"] * 2, ""]
    jobs = entries[3].jobs
    assert [job.name for job in jobs] == ["alone-clients=2-number=0", "alone-clients=2-number=1"]
    assert [job.run.strategy.number for job in jobs] == [0, 1]
    assert [job.run.epochs for job in jobs] == [2, 2]
    assert len(modes(asked(strategies=text, alone=False))) == 3


def test_clients_alone_train_as_long_as_in_the_federated_run():
    mode = {"kind": "federated", "clients": 2, "rounds": 3, "local_epochs": 2}
    entries = planned(asked(strategies=["single", mode]))
    lengths = [{job.run.epochs for job in entry.jobs} for entry in entries]
    assert lengths[1:] == [{6}, {6}] != [lengths[0]] * 2
    other = {**mode, "rounds": 1}
    entries = planned(asked(strategies=["single", mode, other]))
    assert [entry.jobs[0].run.epochs for entry in entries[1:]] == [6, 2, 6, 2]
    assert [entry.alone for entry in entries[1:3]] == [entry.mode.name for entry in entries[3:]]


def test_lengths_of_their_own_do_not_go_with_equal_time():
    def plan(**keys):
        runs = [{"strategy": "ddp", "epochs": 3}]
        return planned(asked(strategies=["single"], runs=runs, **keys))

    with pytest.raises(ConfigError, match=r"epochs: of ddp.*, with budget=seconds.* leave it out"):
        plan(budget="seconds")
    assert len(plan(budget="epochs")) == 2
    timed = [{"name": "long", "time": 2}]
    with pytest.raises(ConfigError, match=r"time: of long, with budget=seconds, .* leave it out"):
        planned(asked(strategies=["single"], runs=timed, budget="seconds"))


def test_placement_takes_the_cpu_twice_and_one_device_the_first():
    entries = planned(asked(strategies=["single", "placement"]))
    assert [entry.jobs[0].run.device for entry in entries] == ["cpu", "cpu,cpu"]


def test_a_finished_run_is_known_by_its_config_wherever_it_lies(tmp_path):
    (entry,) = planned(asked(strategies=["pipeline"]))
    run = entry.jobs[0].run
    chosen = run.model_copy(
        update={"strategy": run.strategy.model_copy(update={"stages": ["neck"]})}
    )
    folder = RunFolder(tmp_path)
    folder.config.write_text(config_text(chosen))
    assert config_sha256(chosen) == digest_of(folder.config)
    folder.write_metrics({"config_sha256": config_sha256(chosen)})
    assert series.same_config(folder, config_text(run))  # the stages it chose itself
    other = run.model_copy(update={"batch": 2})
    assert not series.same_config(folder, config_text(other))
    folder.write_metrics({"config_sha256": "of an earlier config"})
    assert not series.same_config(folder, config_text(run))


def begun(folder, **keys):
    """Return a comparison in `folder`, and what it is to train."""
    config = asked(**keys)
    parts = config, RunFolder(folder), folder, lambda: 0, lambda _: None
    return series.Series(*parts), planned(config)


def complete(folder, **keys):
    """Leave what a comparison leaves whose runs are complete."""
    first, entries = begun(folder, **keys)
    for entry in entries:
        (job,) = entry.jobs
        own = first.folder_of(job.name)
        own.path.mkdir(parents=True)
        own.config.write_text(config_text(job.run))
        own.write_metrics({"config_sha256": config_sha256(job.run)})


def test_a_key_that_was_taken_out_of_the_file_is_not_filled_from_the_folder(tmp_path):
    named = {"name": "mine", "strategy": "ddp"}
    for key, value in {"batch": 2, "strategy.sync_every": 2}.items():
        folder = tmp_path / key
        complete(folder, strategies=["single"], runs=[{**named, key: value}])
        later, entries = begun(folder, strategies=["single"], runs=[named])
        with pytest.raises(ConfigError, match=rf"^{key}: .*mine was trained with .*out="):
            later.refuse_changed(entries)


def test_weights_are_not_taken_for_those_of_another_config(tmp_path):
    def again(**keys):
        return begun(tmp_path, strategies=["single", "pipeline"], **keys)

    complete(tmp_path, strategies=["single", "pipeline"])
    for same in ({}, {"patience": 5, "data.workers": 1, "strategy.timeout_s": 60.0}):
        later, more = again(**same)
        later.refuse_changed(more)
    later, more = again(epochs=7)  # learning rates follow the whole length
    with pytest.raises(ConfigError, match=r"epochs: 7, .*single was trained with .*out="):
        later.refuse_changed(more)
    later, more = again(epochs=7, budget="seconds")  # where lengths follow from a pace
    later.refuse_changed(more)
    later, more = again(**{"optim.lr": 0.5})
    with pytest.raises(ConfigError, match=r"optim.lr: 0.5, .*single was trained with .*out="):
        later.refuse_changed(more)
    assert "optim.lr" in (later.row(more[0], control=True, seconds=None).error or "")


def test_a_client_alone_goes_on_with_its_own_images_only():
    old = Client(clients=3)
    check_same_clients(old, Client(clients=3))
    for key, value in {"number": 1, "clients": 2, "partition": "classes", "alpha": 0.1}.items():
        with pytest.raises(ConfigError, match=f"strategy.{key}: "):
            check_same_clients(old, old.model_copy(update={key: value}))
    for one, other in ((old, Single()), (Single(), old), (old, Federated())):
        with pytest.raises(ConfigError, match=f"strategy: {other.kind}, but the run is"):
            check_same_clients(one, other)


@pytest.mark.parametrize(
    ("starts", "text"),
    [
        ({"single": {0: "a"}, "ddp": {0: "a"}}, "of all: sha256 a"),
        ({"single": {0: "a", 1: "b"}, "ddp": {0: "a", 1: "b"}}, "are the same in all modes, .*1 b"),
        ({"single": {0: "a"}, "larger": {0: "b"}}, "are not the same in all runs"),
        ({}, "of all: sha256 a"),
    ],
)
def test_a_comparison_says_of_which_runs_the_initial_weights_are(starts, text):
    rows = [
        Row(name, {"kind": "ddp"}, trials=[Trial(name, s, name, initial_sha256=k) for s, k in own])
        for name, own in ((name, by_seed.items()) for name, by_seed in starts.items())
    ]
    found = Comparison(Path(), rows, len(rows), "detect", "a", {}, {}, 0)
    assert re.match(text, found.origin())
    assert f"initial weights {found.origin()[:20]}" in str(found)


def test_a_run_whose_processes_began_again_tells_so_and_no_time_of_starting(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"config_sha256": "x"}')
    note_whole(folder, 9.5, 0)
    assert (whole_of(folder, "x"), whole_of(folder, "y")) == ((9.5, 0), (None, 0))
    note_whole(folder, 99.0, 2)
    assert whole_of(folder, "x") == (None, 2)
    trial = Trial("ddp", 0, lost={"skipped_steps": 0})
    assert with_restarts(trial, 2).lost == {"skipped_steps": 0, "restarts": 2}
    assert with_restarts(trial, 0) is trial
    later = replace(with_restarts(trial, 2), scores={"map": 0.5})
    both = together(Row("ddp", {"kind": "ddp"}), [replace(trial, scores={"map": 0.5}), later])
    assert both.lost == {"skipped_steps": 0, "restarts": 2}


def test_what_a_comparison_that_goes_on_no_longer_shows_is_told(tmp_path):
    (tmp_path / "compare.yaml").write_text("strategies: [single, {kind: ddp}]\nseeds: [0, 1]\n")
    asked = {"out": str(tmp_path), "strategies": [{"kind": "ddp"}, "fsdp"], "seeds": [0, 1, 2]}
    (line,) = _left_out(asked | {"resume": True})
    assert line.startswith("strategies: without single, which the comparison had")
    assert not list(_left_out(asked | {"resume": False}))
