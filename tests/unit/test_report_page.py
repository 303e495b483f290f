"""report.html: from whatever is in the folder, safe whatever it is named, and alone."""

from __future__ import annotations

import json
import os
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from visiontrain.report.figure import short
from visiontrain.report.page import VOID, Html, tag
from visiontrain.report.pictures import CONFIDENCE
from visiontrain.report.run_report import duration, show, write_report

EVIL = "</title><script>alert('x')</script><img src=x onerror=\"alert(1)\">&amp;"
METRICS = {
    "task": "detect",
    "split": "val",
    "images": 87,
    "names": ["cat", EVIL],
    "map": 0.4711,
    "map50": 0.8642,
    "map_small": float("nan"),
    "map_large": None,
    "precision": 0.85,
    "recall": 0.82,
    "conf": 0.416,
    "per_class": {"cat": {"map": 0.61, "boxes": 1200}, EVIL: {"map": 0.33, "boxes": 3}},
    "epochs": 50,
    "best_epoch": 2,
    "seconds": 303.4,
    "strategy": "ddp",
    "processes": 2,
    "versions": {"torch": "2.14.1", EVIL: EVIL},
    EVIL: EVIL,
}


class Reader(HTMLParser):
    """Collects what a browser would see, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader


@pytest.fixture
def folder(tmp_path):
    """Make the folder of a run, of which every name is an attack."""
    run = tmp_path / "run <b> & 'one'"
    (run / "plots").mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps(METRICS))
    (run / "config.yaml").write_text(
        f"data:\n  source: {json.dumps(EVIL)}\nmodel: {{kind: yolo_n}}"
    )
    (run / "results.csv").write_text(
        "epoch,step,val/map\n1,10,0.30\n2,20,0.48\n3,30,0.47\n4,40,nan\n"
    )
    noise = np.random.default_rng(0).integers(0, 255, (500, 500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(run / "plots" / "val_predictions.png")
    Image.fromarray(noise[:50, :50]).save(run / "plots" / "pr_curve.png")
    Image.fromarray(noise[:50, :50]).save(run / "plots" / '"><script>x<.png')
    return run


def test_everything_is_there(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    text = " ".join(read(path).text)
    for wanted in (
        "0.471",  # mAP50-95
        "82% are found",
        "85% is right (at confidence 0.42)",
        "The class found best is 'cat'",
        "5 min 3 s for 50 epochs with strategy ddp, 2 processes",
        "The best epoch was 2 of 4 (mAP50-95 0.480)",
        f"visiontrain train '{folder.parent}/",  # quoted for a shell
        "1,200",
        "2.14.1",
        "\N{EN DASH}",  # mAP small, which nothing decides
    ):
        assert wanted in text
    assert "missing" not in text
    assert "nan" not in text.replace("\nnan", "")


def test_classes_of_whole_images_are_no_detections(folder):
    metrics = {"task": "classify", "map": 0.9, "precision": 0.8, "recall": 0.7, "f1": 0.75}
    metrics["per_class"] = {"cat": {"map": 0.95}, "dog": {"map": 0.85}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    results = folder / "results.csv"
    results.write_text("epoch,step,val/map\n1,1,0.5\n2,2,0.9\n")
    text = " ".join(read(write_report(folder)).text)
    assert "The class found best is 'cat' (mAP 0.950)" in text
    assert "share of images' classes that are said" in text
    for wrong in ("mAP50-95", "share of boxes", "overlap", "best confidence", "detections"):
        assert wrong not in text, wrong


def test_the_picture_of_predictions_says_which_are_drawn(folder):
    text = " ".join(read(write_report(folder)).text)
    assert f"to the right of each the predictions scored above {CONFIDENCE}." in text


def test_captions_say_how_curves_and_matrices_are_counted(folder):
    for name in ("precision_curve", "confusion_matrix"):
        (folder / f"plots/{name}.png").hardlink_to(folder / "plots/pr_curve.png")
    text = " ".join(read(write_report(folder)).text)
    assert "is right, 1 for a class of which nothing is left." in text
    assert "as counts, at confidence 0.25 and overlap 0.45." in text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_folder_whose_name_is_no_utf8_gets_its_page(folder):
    odd = folder.rename(folder.with_name(os.fsdecode(b"run \xb9")))
    assert "run ?" in " ".join(read(write_report(odd)).text)


def test_names_of_users_stay_text(folder):
    page = read(write_report(folder))
    assert "script" not in page.tags
    assert page.tags.count("img") == 3  # the plots, none of EVIL's
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    text = "".join(page.text)
    assert text.count(EVIL) >= 6  # title, headline, class, version and its name, fact, config


def test_the_page_stands_alone(folder):
    page = read(write_report(folder))
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    sources = [value for key, value in page.attributes if key in ("src", "href")]
    assert len(sources) == 3
    assert all(source.startswith("data:image/") for source in sources)
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 1  # the large one
    assert "url(" not in "".join(page.text)
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    text = " ".join(read(write_report(tmp_path)).text)
    for name in ("config.yaml", "metrics.json", "results.csv"):
        assert f"{name} is missing" in text
    assert "plots/ holds no picture" in text


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.json", "results.csv", "plots/pr_curve.png"]
)
def test_a_file_that_is_torn_is_named_and_the_rest_is_shown(folder, name):
    (folder / name).write_bytes(b"\x89PNG {: [\xff\x00\n")
    text = " ".join(read(write_report(folder)).text)
    assert f"{name.split('/')[-1]} can't be read" in text
    assert ("0.471" in text) == (name != "metrics.json")


def test_numbers_are_written_for_people():
    assert [duration(s) for s in (0.4, 59.6, 61, 7800)] == [
        "0 s",
        "1 min 0 s",
        "1 min 1 s",
        "2 h 10 min",
    ]
    assert [show(v) for v in (0.12345, 1234.5, 123456, None, "ddp", True)] == [
        "0.123",
        "1,234.5",
        "123,456",
        "\N{EN DASH}",
        "ddp",
        "True",
    ]


def test_only_marked_text_is_html():
    inside = tag("b", "a<b", {"title": '"'})
    assert inside == '<b title="&quot;">a&lt;b</b>'
    assert tag("p", [inside, None, "&"]) == f"<p>{inside}&amp;</p>"
    assert isinstance(inside, Html)


def test_long_names_lose_their_middle():
    assert short("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert short("two\nlines") == "two lines"
