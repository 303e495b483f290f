"""Steps that are not finite: few change nothing, many are gone back from, and too many are told."""

import csv
from dataclasses import replace

import pytest
import torch
from small import newest, poison, prepared, scores, watched, weights_of

from visiontrain.core.errors import DivergedError
from visiontrain.engine.run_folder import RunFolder
from visiontrain.engine.weights import load_weights


def test_a_bad_step_or_two_change_nothing(tmp_path):
    _, fitter = prepared(tmp_path)
    before = {}

    def look(step):
        before[step] = weights_of(fitter)
        return step == 4

    outcome = scores(poison(fitter, look), [0.1] * 3).fit()
    assert outcome.exit_code == 0
    assert outcome.metrics["skipped_steps"] == 0
    assert all(torch.equal(before[4][k], v) for k, v in before[5].items() if v.is_floating_point())
    assert any(not torch.equal(before[3][k], v) for k, v in before[4].items())


def test_ten_bad_steps_roll_back_and_are_left_out(tmp_path):
    bad = range(7, 19)
    keys = {"epochs": 8, "log.every": 5}
    _, fitter = prepared(tmp_path / "a", **keys)
    watch = watched(scores(poison(fitter, lambda step: step in bad), [0.1] * 20))
    outcome = fitter.fit()
    assert outcome.exit_code == 0
    (line,) = [line for line in watch.lines if "roll-backs" in line]
    assert "steps 7 to 17 were not finite; back to step 6" in line
    assert sorted(fitter.journal.skipped) == list(range(7, 18))

    _, other = prepared(tmp_path / "b", **keys)  # steps that were never there
    scores(poison(other, lambda step: step == 18), [0.1] * 20)
    other.journal.skipped = set(range(7, 18))
    other.fit()
    ours, theirs = weights_of(fitter), weights_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_was_rolled_back_is_no_row(tmp_path):
    _, fitter = prepared(tmp_path, epochs=8, **{"log.every": 5})
    poison(scores(fitter, [0.1] * 20), lambda step: step in range(7, 19))
    fitter.fit()
    with RunFolder(tmp_path).results.open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    for key in ("epoch", "step", "samples"):
        values = [row[key] for row in rows]
        assert values == sorted(values)
    assert len({row["epoch"] for row in rows}) == len(rows)
    assert rows[-1]["epoch"] == 8


def test_an_epoch_without_finite_scores_is_told_and_does_not_end_the_run(tmp_path):
    """The first and the last of three: the second one's weights are the best."""
    _, fitter = prepared(tmp_path, epochs=3)
    watch = watched(fitter)
    clean, seen = fitter.parts.evaluate, []

    def looks(asked):
        seen.append(len(seen))
        if seen[-1] not in (0, 2):
            return clean(asked)
        before = {name: tensor.clone() for name, tensor in fitter.learner.ema.items()}
        for tensor in fitter.learner.ema.values():
            tensor.fill_(float("nan"))
        try:
            return clean(asked)
        finally:
            for name, tensor in fitter.learner.ema.items():
                tensor.copy_(before[name])

    fitter.parts = replace(fitter.parts, evaluate=looks)
    outcome = fitter.fit()
    told = [line for line in watch.lines if "is not scored" in line]
    assert [line.split(":")[0] for line in told] == [f"epoch {n} is not scored" for n in (1, 3)]
    assert all("not finite" in line for line in told)
    assert (outcome.exit_code, outcome.metrics["best_epoch"]) == (0, 2)


def test_a_run_that_was_never_scored_ends_as_diverged(tmp_path):
    _, fitter = prepared(tmp_path, epochs=2)

    def looks(asked):
        raise DivergedError("evaluation: 3 of 4 detections are not finite")

    fitter.parts = replace(fitter.parts, evaluate=looks)
    with pytest.raises(DivergedError, match="3 of 4"):
        fitter.fit()
    assert not RunFolder(tmp_path).metrics.exists()


@pytest.mark.parametrize("val", [True, False])
def test_a_run_of_bad_steps_is_not_complete_however_short_its_epochs(tmp_path, val):
    """Ten bad steps in a row are several epochs here: they end none of them well."""
    _, fitter = prepared(tmp_path, epochs=9, val=val, **{"log.every": 5})
    poison(scores(fitter, [0.1] * 99), lambda step: step > 1)
    with pytest.raises(DivergedError, match=r"training: .* not finite.*; try a lower optim\.lr"):
        fitter.fit()
    assert not RunFolder(tmp_path).metrics.exists()


def test_bad_steps_at_the_very_end_leave_a_complete_run(tmp_path):
    _, fitter = prepared(tmp_path, epochs=2)
    last = 2 * fitter.settings.steps_per_epoch
    poison(scores(fitter, [0.1] * 9), lambda step: step == last - 1)
    assert fitter.fit().exit_code == 0
    assert newest(tmp_path).progress["step"] == last


def test_divergence_is_seen_whatever_the_checkpoints(tmp_path):
    """A good epoch that comes again after a roll-back earns no new roll-backs."""
    keys = {"batch": 1, "epochs": 9, "save.every_epochs": 2}
    _, fitter = prepared(tmp_path, **keys)
    scores(poison(fitter, lambda step: step >= 38), [0.1, 0.2, 0.3, *[0.0] * 99])
    with pytest.raises(DivergedError, match="after 3 roll-backs"):
        fitter.fit()


def test_bad_steps_without_end_are_divergence(tmp_path):
    _, fitter = prepared(tmp_path, batch=1, epochs=6)
    scores(poison(fitter, lambda step: step >= 2), [0.1] * 99)
    with pytest.raises(DivergedError, match=r"after 3 roll-backs; try a lower optim\.lr") as caught:
        fitter.fit()
    assert caught.value.exit_code == 5


def test_a_roll_back_keeps_the_best_weights(tmp_path):
    _, fitter = prepared(tmp_path, epochs=8, **{"log.every": 5})
    values = [0.1, 0.1, 0.9, *[0.05] * 20]  # the third epoch ends in two bad steps
    poison(scores(fitter, values), lambda step: step in range(7, 19))
    outcome = fitter.fit()
    assert load_weights(tmp_path).meta.epoch == outcome.metrics["best_epoch"] == 3
