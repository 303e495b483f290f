"""What a comparison makes of its runs: means, noise, verdicts, and which run is the same."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import comparisons
import pytest
import torch

from visiontrain import series
from visiontrain.compare_config import USES, CompareConfig, modes, seeds
from visiontrain.comparison import planned
from visiontrain.core.config import from_keys
from visiontrain.core.durable import digest_of
from visiontrain.core.errors import ConfigError
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.trace import Trace
from visiontrain.prepare import config_sha256, config_text
from visiontrain.report.compare import Comparison
from visiontrain.report.related import related
from visiontrain.report.rows import NOT_MEASURED, Row, Trial, measured, together
from visiontrain.report.verdict import verdict
from visiontrain.strategies.config import Client, Single
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.keeping import check_same_clients

SMALL = {"data": {"source": "tiny", "train_images": 12, "val_images": 4}, "imgsz": 64, "batch": 4}


def row_of(name, kind, scores, rate=10.0, **keys):
    trials = [
        Trial(name, seed, scores={"map": score}, images_per_s=rate, processes=1)
        for seed, score in enumerate(scores)
    ]
    return replace(together(Row(name, {"kind": kind}), trials), **keys)


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


def test_the_verdict_takes_only_what_the_figures_allow():
    def said(*rows):
        return verdict(related(rows), "mAP")

    single = row_of("single", "single", [0.5], exactness="control")
    exact = row_of("ddp", "ddp", [0.49], rate=18.0, exactness="exact", check_steps=3)
    fast = row_of("local", "ddp", [0.6], rate=30.0, exactness="approximate")
    assert said(single, exact, fast)[0].startswith("Take ddp: 1.80 times as fast")
    assert "With one seed nobody can tell" in said(single, exact, fast)[1]
    assert said(single, fast)[0].startswith("Take single: no other mode that is as good")
    unknown = replace(exact, exactness=NOT_MEASURED)
    assert said(single, unknown)[0].startswith("Take single: of faster modes nobody measured")
    many = row_of("single", "single", [0.48, 0.5, 0.52], exactness="control")
    sure = row_of("local", "ddp", [0.5, 0.5, 0.5], rate=30.0, exactness="approximate")
    assert said(many, exact, sure)[0].startswith("Take local: 3.00 times as fast")
    vague = row_of("single", "single", [0.3, 0.4, 0.5], exactness="control")
    assert said(vague, sure)[0].startswith("Take single")  # so wide a noise says nothing
    bad = row_of("local", "ddp", [0.3, 0.3, 0.3], rate=30.0, exactness="approximate")
    answer = said(many, exact, bad)
    assert answer[0].startswith("Take ddp")
    assert any(text.startswith("local is worse: mAP -0.200") for text in answer)
    shared = {"rounds": 2, "exactness": "different algorithm", "alone": "alone"}
    shared = row_of("fed", "federated", [0.40, 0.42], **shared)
    alone = row_of("alone", "client", [0.1, 0.1])
    assert "more than the best client alone (0.100 ± 0.000)" in " ".join(said(many, shared, alone))
    near = row_of("alone", "client", [0.41, 0.41])
    assert "within noise of the best client alone" in " ".join(said(many, shared, near))
    once = " ".join(said(single, shared, alone))
    assert "more than, by one seed, the best client alone" in once
    short = row_of("single", "single", [0.01], exactness="control")
    assert any("say little" in text for text in said(short, exact))
    assert said(row_of("single", "single", []), exact) == [
        "Nothing can be said: the control run has no result."
    ]


def said(*rows):
    return verdict(related(rows), "mAP")


def test_exact_is_as_good_only_with_the_settings_and_samples_of_the_control():
    single = row_of("single", "single", [0.5], exactness="control", peak_rss_mb=900.0)
    fast = {"rate": 30.0, "exactness": "exact", "peak_rss_mb": 100.0}
    same = row_of("ddp", "ddp", [0.5], **fast)
    assert said(single, same)[0].startswith("Take ddp: 3.00 times")
    assert any("ddp is the exact mode that needs least" in text for text in said(single, same))
    for keys in ({"keys": {"imgsz": 32}}, {"samples": 7}):
        other = row_of("small", "ddp", [0.2], **fast, **keys)
        assert said(single, other)[0].startswith("Take single: ")
        assert not any("needs least" in text for text in said(single, other))
    many = row_of("single", "single", [0.48, 0.5, 0.52], exactness="control")
    near = row_of("small", "ddp", [0.5, 0.5], **fast, keys={"imgsz": 32})
    assert "not more than twice the standard error" in said(many, near)[0]


def test_without_one_device_speeds_are_compared_with_the_control():
    slow = row_of("fsdp", "fsdp", [0.5], exactness="exact")
    fast = row_of("ddp", "ddp", [0.5], rate=20.0, exactness="exact")
    answer = said(slow, fast)[0]
    assert answer.startswith("Take ddp: 2.00 times as fast")
    assert answer.endswith("No control of one device was run: compared with fsdp.")
    loose = replace(slow, exactness="approximate")
    assert said(loose, fast)[0].startswith("Take fsdp: ")  # what ddp equals did not run


def test_scores_of_next_to_nothing_and_of_exact_modes_are_not_called_worse_or_good():
    low = row_of("single", "single", [0.04, 0.041, 0.042], exactness="control")
    fast = row_of("local", "ddp", [0.05, 0.05], rate=30.0, exactness="approximate")
    worse = row_of("bad", "ddp", [0.01, 0.01], exactness="approximate")
    assert said(low, fast, worse)[0].startswith("Take single: ")
    assert not any("worse" in text for text in said(low, fast, worse))
    high = row_of("single", "single", [0.50, 0.501, 0.502], exactness="control")
    exact = row_of("ddp", "ddp", [0.4, 0.4], rate=30.0, exactness="exact")
    assert said(high, exact)[0].startswith("Take ddp: ")
    assert not any("worse" in text for text in said(high, exact))


def test_seeds_that_all_score_the_same_give_no_bound():
    same = row_of("single", "single", [0.1, 0.1, 0.1], exactness="control")
    other = row_of("local", "ddp", [0.11, 0.11], rate=30.0, exactness="approximate")
    _, row = related([same, other])
    assert (row.word, row.noise) == ("no spread", None)
    assert said(same, other)[0].startswith("Take single: ")
    assert said(same, other)[1].startswith("With seeds that all score the same")


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


def test_weights_are_not_taken_for_those_of_another_config(tmp_path):
    def again(**keys):
        config = asked(strategies=["single", "pipeline"], **keys)
        entries = planned(config)
        folder = RunFolder(tmp_path)
        return series.Series(config, folder, tmp_path, lambda: 0, lambda _: None), entries

    first, entries = again()
    for entry in entries:
        (job,) = entry.jobs
        folder = first.folder_of(job.name)
        folder.path.mkdir()
        folder.config.write_text(config_text(job.run))
        folder.write_metrics({"config_sha256": config_sha256(job.run)})
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
