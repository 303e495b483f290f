"""What a comparison advises: only what its figures allow."""

from dataclasses import replace

from comparisons import row_of

from visiontrain.report.related import related
from visiontrain.report.rows import NOT_MEASURED
from visiontrain.report.verdict import verdict


def said(*rows):
    return verdict(related(rows), "mAP")


def test_the_verdict_takes_only_what_the_figures_allow():
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
    for other in (
        replace(unknown, reasons=["it failed"]),
        replace(unknown, samples=7),
        replace(unknown, rounds=2),
    ):  # nothing was left unmeasured that check=true would tell
        assert said(single, other)[0].startswith("Take single: no other mode that is as good")
    apart = " ".join(said(shared, alone))  # without one device
    assert "more than, by one seed" not in apart
    assert "the best client alone (0.100 ± 0.000)" in apart
    assert "in one place" not in apart
    short = row_of("single", "single", [0.01], exactness="control")
    assert any("say little" in text for text in said(short, replace(exact, scores={"map": 0.02})))
    assert said(row_of("single", "single", []), exact) == [
        "Nothing can be said: the control run has no result."
    ]


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


def test_what_is_better_than_the_control_is_taken_or_told():
    """Also where the control learned nothing: that is no short training of them all."""
    for scores in ([0.49, 0.5, 0.51], [0.0, 0.0, 0.01]):
        control = row_of("single", "single", scores, exactness="control")
        other = row_of("half", "single", [0.6, 0.61, 0.62], keys={"optim.lr": 0.1})
        answer = said(control, other)
        assert answer[0].startswith("Take half: its mAP of 0.610")
        slow = replace(other, images_per_s=2.0)
        answer = said(control, slow)
        assert answer[0].startswith("Take single: no other mode")
        (line,) = [text for text in answer if text.startswith("half is better: mAP +")]
        assert line.endswith("at 0.20 times the speed.")
        assert not any("say little" in text for text in answer)
