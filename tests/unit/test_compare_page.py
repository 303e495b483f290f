"""The page of a comparison in a headless Chromium: it sorts, toggles, tells, and asks nobody."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import browser
import comparisons
import numpy as np
import pytest
import torch

from visiontrain.core.types import Detections
from visiontrain.report.compare_page import commands_of, write_page
from visiontrain.report.compare_sections import shown_samples
from visiontrain.report.page import Extras, page
from visiontrain.report.side_by_side import samples

NUMBERS = "[...document.querySelector('table.sortable').tBodies[0].rows].map(r => r.cells[{}]"
PATHS = "document.querySelectorAll('.plot path.curve').length"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    found = comparisons.comparison(folder)
    write_page(found, comparisons.pictures())
    found.write()
    return found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if browser.find() is None:
        pytest.skip("no Chromium is installed")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_loads_nothing_says_nothing_and_fits(written, chromium, width, dark):
    chromium.open(written.folder / "report.html", width, dark=dark)
    assert not [url for url in chromium.requests()[1:] if not url.startswith("data:")]
    assert chromium.complaints() == []
    assert chromium.run("document.documentElement.scrollWidth") <= width
    assert chromium.run("document.title") == f"{written.title}: modes compared"  # no name ran
    assert chromium.run("document.scripts.length") == 2  # the data and our own
    assert chromium.run("document.images.length") == 18
    paper = chromium.run("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") != dark


def test_a_click_on_a_title_sorts_and_another_turns_it_round(written, chromium):
    chromium.open(written.folder / "report.html")
    titles = chromium.run(
        "[...document.querySelector('table.sortable').tHead.rows[0].cells].map(c => c.innerText)"
    )
    column = next(k for k, title in enumerate(titles) if title.startswith("images"))
    button = f"table.sortable thead th:nth-child({column + 1}) button"
    chromium.click(button)
    shown = chromium.run(NUMBERS.format(column) + ".dataset.value)")
    speeds = [float(text) for text in shown if text]
    assert speeds == sorted(speeds)
    assert shown[-1] == ""  # what failed comes last either way
    chromium.click(button)
    again = chromium.run(NUMBERS.format(column) + ".dataset.value)")
    assert [float(text) for text in again if text] == speeds[::-1]
    assert again[-1] == ""
    state = f"document.querySelector('{button}').parentElement.ariaSort"
    assert chromium.run(state) == "descending"


def test_a_name_hides_its_curves_and_axes_change(written, chromium):
    chromium.open(written.folder / "report.html", 390)
    assert chromium.run(PATHS) == 24  # eight modes, three seeds each
    chromium.click("[data-mode='1']")
    assert chromium.run(PATHS) == 21
    assert chromium.run("document.querySelector('[data-mode=\"1\"]').ariaPressed") == "false"
    chromium.click("[data-axis='2']")
    last = "[...document.querySelectorAll('.plot text')].at(-1).textContent"
    assert chromium.run(last) == "MB sent"
    chromium.click("[data-mode='1']")
    assert chromium.run(PATHS) == 24


def test_pointing_at_a_curve_tells_its_values(written, chromium):
    chromium.open(written.folder / "report.html")
    x, y = chromium.run(
        "(() => { const d = document.querySelector('.plot circle.dot');"
        "d.scrollIntoView({block: 'center'}); const r = d.getBoundingClientRect();"
        "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
    )
    chromium.hover(x, y)
    told = chromium.run("document.querySelector('.tip').innerText").splitlines()
    point = written.rows[0].trials[0].curve[0]
    assert told[0].endswith("-seed=0")
    assert told[1].startswith("mAP 0.1")
    assert f"{point.samples:.0f} images seen" in told
    chromium.hover(2, 2)
    assert chromium.run("document.querySelector('.tip').hidden")


def test_the_policy_stops_what_is_not_ours(chromium, tmp_path):
    """Were a name not escaped, the browser would refuse it: requests, scripts, handlers."""
    body = "<script>document.title='x'</script><img src=https://example.org/a.png onerror=alert(1)>"
    path = tmp_path / "page.html"
    whole = page("mine", "text", Extras(script="document.title += '!'"))
    path.write_text(whole.replace("text</main>", f"{body}</main>"))
    chromium.open(path)
    assert chromium.run("document.title") == "mine!"
    assert len(chromium.complaints()) >= 2


def test_the_page_says_what_the_figures_are(written):
    text = (written.folder / "report.html").read_text(encoding="utf-8")
    assert comparisons.EVIL not in text
    for wanted in (
        "Take ddp: 1.60 times as fast on 2 processes",
        "beyond 0.007",
        "lost to faults in all seeds: 3 processes, workers and servers started again",
        "6 gradients that came too late in all seeds, their images were handed out again",
        "(0 of 25%, 1 of 75%)",
        "clients sent 30.0 MB",
        "score 0.440 on the images of the client that they serve worst",
        "weights differ by 1.0e-13 at most",
        "memory of the main process and the largest worker, without servers: 900, 882 MiB",
        "visiontrain parity takes longer",
        f"visiontrain parity {written.folder}/ddp-seed=0/config.yaml",
    ):
        assert wanted in text, wanted
    assert len(commands_of(written)) == 1 + 24 + 6
    unmeasured = [replace(row, gap=None) for row in written.rows]
    assert len(commands_of(replace(written, rows=unmeasured))) == 1 + 24


def test_it_says_when_not_all_saw_as_many_images(tmp_path):
    found = comparisons.comparison(tmp_path)
    assert "All trained on as many images" in write_page(found).read_text(encoding="utf-8")
    fewer = replace(found, rows=[replace(found.rows[0], samples=400), *found.rows[1:]])
    text = write_page(fewer).read_text(encoding="utf-8")
    assert "Not all trained on as many images, but on 400 to 800" in text


def test_csv_and_json_lie_beside_it(written):
    whole = json.loads((written.folder / "compare.json").read_text())
    assert whole["verdict"] == written.verdict()
    assert [len(row["trials"]) for row in whole["rows"]] == [3] * 8 + [1]
    assert whole["rows"][1]["trials"][2]["curve"][0]["samples"] == 80
    with (written.folder / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["seeds"] for line in lines] == ["0 1 2"] * 8 + [""]
    assert float(lines[1]["data_s"]) == pytest.approx(1.0)  # a tenth of ten seconds
    assert lines[1]["communication_s"] == ""  # ddp does not tell it apart


def test_one_row_without_anything_is_a_page_too(tmp_path):
    found = comparisons.comparison(tmp_path)
    alone = replace(found, rows=found.rows[-1:], planned=3)
    text = write_page(alone).read_text(encoding="utf-8")
    assert "Nothing can be said" in text
    assert "2 rows are still to come" in text


def test_a_picture_that_cannot_be_made_costs_only_itself_and_is_said(caplog):
    class Images:
        def __len__(self):
            return 2

        def name(self, row):
            return f"{row}.jpg"

        def read(self, row):
            return np.full((8, 8, 3), 10 * row, np.uint8)

    class Split:
        task, names, images = "detect", ("cat",), Images()
        boxes, classes = np.zeros((0, 4)), np.zeros(0, np.int64)

        def __len__(self):
            return 2

        def rows(self, _):
            return slice(0, 0)

    loaded = []

    def foreign():
        """Of weights with more classes than the data."""
        loaded.append("foreign")
        box, score, label = torch.tensor([[1.0, 1, 6, 6]]), torch.tensor([0.9]), torch.tensor([7])
        return lambda _: Detections(box, score, label, ("zebra",))

    def full():
        loaded.append("full")

        def predict(pixels):
            if pixels.any():
                raise torch.OutOfMemoryError("no memory")
            none = torch.zeros(0)
            return Detections(torch.zeros(0, 4), none, none.long())

        return predict

    def absent():
        raise OSError("no such file")

    found = samples(Split(), {"absent": absent, "foreign": foreign, "full": full})
    assert loaded == ["foreign", "full"]
    made = [[bool(shot.url) for shot in sample.shots] for sample in found]
    assert made == [[True, False, True, True], [True, False, True, False]]
    assert found[1].shots[3].text == "no picture: OutOfMemoryError: no memory"
    assert len(caplog.records) == 2
    shown = "".join(map(str, shown_samples(found)))
    assert shown.count("<img") == 5
    assert "no picture: OSError: no such file" in shown
