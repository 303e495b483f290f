"""What `check` tells people: what is missing, and how many of a thing there are."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from layouts import WRITERS, opened, write_csv, write_yolo
from memory import memory_table

from visiontrain.cli import main
from visiontrain.core.errors import DataError
from visiontrain.data.build import whole_images
from visiontrain.data.census import advice, balance_of, box_sizes
from visiontrain.data.check import check
from visiontrain.data.defects import counted
from visiontrain.data.twins import difference_hash, find_twins, small_copy
from visiontrain.report.check_page import write_check


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_run_needs_both_splits_and_is_told_how_to_add_one(missing, tmp_path):
    yaml = Path(write_yolo(tmp_path / "set"))
    yaml.write_text(yaml.read_text().replace(f"{missing}: ", "test: "))
    spec = opened(yaml, tmp_path / "cache")
    report = check(spec, list(spec.splits))
    assert not report.trainable
    told = f"{missing}: no such split, and a run needs it; add `{missing}:` to the data set's YAML"
    assert told in report.lines()


def spoilt(image):
    """Let a picture be one that only decoding finds to be damaged."""
    data = bytearray(cv2.imencode(".png", np.eye(64, dtype=np.uint8) * 200)[1].tobytes())
    data[45:60] = bytes(15)
    image.with_suffix(".png").write_bytes(bytes(data))
    image.unlink()


DEFECTIVE = {
    "nothing": (lambda root: None, 0),
    "no picture can be decoded": (
        lambda root: [spoilt(image) for image in (root / "images/train").glob("*")],
        3,
    ),
    "a class out of range": (lambda root: (root / "labels/val/c.txt").write_text("9 .5 .5 1 1"), 3),
    "a split is gone": (lambda root: (root / "images/val").rename(root / "images/gone"), 3),
}


@pytest.mark.parametrize("case", DEFECTIVE)
def test_the_exit_code_says_whether_a_run_would_start(case, tmp_path, capsys):
    source = write_yolo(tmp_path / "set")
    spoil, code = DEFECTIVE[case]
    spoil(tmp_path / "set")
    assert (
        main(["check", f"data={source}", f"data.cache_dir={tmp_path / 'cache'}", "--json"]) == code
    )
    found = json.loads(capsys.readouterr().out)
    assert found["trainable"] == (not code)
    assert found["splits"]["train"]["images"] == (0 if "decoded" in case else 4)


def test_one_of_a_thing_is_not_written_as_many(tmp_path):
    yaml = Path(write_yolo(tmp_path / "set"))
    yaml.write_text("train: images/train\nval: images/val\nnames: [cat]\n")
    for split in ("train", "val"):
        for name in "bcd":
            (tmp_path / f"set/images/{split}/{name}.jpg").unlink()
    spec = opened(yaml, tmp_path / "cache")
    with pytest.raises(DataError, match=r"\(1 defect: 1 class-range\)"):
        spec.table("train")
    first, second = check(spec, ["train"]).lines()[:2]
    assert first.endswith(": yolo, 1 class")
    assert second.startswith("train: 1 image, 1 box, 0 images without a box, ")
    for labels in (tmp_path / "set/labels/train").iterdir():
        labels.unlink()
    with pytest.raises(DataError, match="no box in 1 image;"):
        spec.table("train")
    assert [counted(n, "box") for n in (0, 1, 2000)] == ["0 boxes", "1 box", "2,000 boxes"]


def scene(seed):
    """Return a picture with structure, as cameras make them."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return cv2.resize(small, (160, 120), interpolation=cv2.INTER_CUBIC)


def twins_of(pictures, split):
    hashes = np.array([difference_hash(picture) for picture in pictures], np.uint64)
    copies = np.stack([small_copy(picture) for picture in pictures])
    return find_twins(hashes, copies, np.asarray(split))


def recoded(picture):
    return cv2.imdecode(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], 1)


CHANGES = {
    "recoded": recoded,
    "smaller": lambda picture: cv2.resize(picture, (80, 60)),
    "brighter": lambda picture: cv2.convertScaleAbs(picture, alpha=0.8, beta=30),
    "moved": lambda picture: np.roll(picture, 2, axis=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_in_another_split_is_found_and_no_other_picture(change):
    pictures = [scene(seed) for seed in range(60)]
    later = [scene(seed) for seed in range(100, 120)] + [CHANGES[change](pictures[7])]
    found = twins_of(pictures + later, [0] * 60 + [1] * 21)
    assert found.other[80] == 7
    assert np.flatnonzero(found.other >= 0).tolist() == [80]
    assert not found.inside.any()
    assert twins_of([*pictures, pictures[3]], [0] * 61).inside.sum() == 2


def test_pictures_that_are_all_alike_are_no_twins_for_it():
    """Small digits on black: any two 1s are nearer than two photographs ever are."""
    base = np.zeros((16, 16, 3), np.float32)
    base[2:14, 6:9] = 200
    random = np.random.default_rng(0)
    noisy = [base + random.normal(0, 14, base.shape) for _ in range(200)]
    found = twins_of([np.clip(p, 0, 255).astype(np.uint8) for p in noisy], [0] * 150 + [1] * 50)
    assert (found.other >= 0).sum() <= 2
    plain = twins_of([np.full((32, 32, 3), k % 9, np.uint8) for k in range(40)], [0, 1] * 20)
    assert (plain.other < 0).all()  # black pictures say nothing


def test_many_pictures_do_not_take_the_time_of_all_pairs():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**63, 20_000).astype(np.uint64)
    copies = random.integers(0, 255, (20_000, 16, 16, 3), np.uint8)
    hashes[19_999], copies[19_999] = hashes[5] ^ np.uint64(0b1011), copies[5]
    found = find_twins(hashes, copies, (np.arange(20_000) >= 15_000).astype(np.int64))
    assert np.flatnonzero(found.other >= 0).tolist() == [19_999]


def test_sizes_of_boxes_are_told_for_the_input():
    rows = [[0, 0, 0, 20, 20], [0, 0, 0, 40, 40], [1, 100, 100, 300, 220], [1, 0, 0, 330, 30]]
    table = memory_table([np.zeros((480, 640, 3), np.uint8)], [np.array(rows, np.float32)])
    sizes = box_sizes(table, 160)  # a quarter
    assert (sizes.small, sizes.medium, sizes.large) == (1, 1 + 0, 2)
    assert (sizes.tiny_at_imgsz, sizes.most_in_image) == (1, 4)
    assert sizes.thin == 1
    assert sizes.most_thin == 11
    said = " ".join(advice({"train": table}, 160))
    assert "25% of the boxes are below 8 px at imgsz=160 and hard to find; try imgsz=320" in said
    assert "train has no label of class 2, class 3, which cannot be learned" in said


@pytest.mark.parametrize(("several", "kind"), [(False, "class"), (True, "repeat")])
def test_rare_classes_are_named_with_what_helps(several, kind):
    labels = np.array([0] * 60 + [1] * 57 + [2] * 3)
    pictures = np.full((120, 2), 32, np.int32)
    names, each = ("cat", "dog", "owl"), np.ones(120, np.int64)
    table = whole_images(names, None, pictures, labels, each, several=several)
    (line,) = advice({"train": table}, 640)
    assert line == (
        f"1 class of 3 in few images of train (owl in 3 of 120); try data.balance={kind}"
    )
    balance = balance_of({"train": table})
    assert (balance.ratio, balance.most, balance.least) == (20, "cat", "owl")


@pytest.mark.parametrize("layout", WRITERS)
def test_a_page_is_written_of_every_layout(layout, tmp_path):
    spec = opened(WRITERS[layout](tmp_path / "set"), tmp_path / "cache")
    report = check(spec, list(spec.splits), imgsz=64)
    text = write_check(report, tmp_path / "out").read_text()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.html"]
    Sound().feed(text)
    assert "://" not in re.sub(r"data:image/[a-z]+;base64,[\w+/=]+", "", text)
    assert text.count("<img ") == 4 + (report.splits[0].noun == "box") - (not report.pairs)
    found = json.loads(json.dumps(report.as_json()))
    assert found["balance"]["ratio"] >= 1
    assert found["splits"]["train"].keys() >= {"duplicates", "near_duplicates", "repeated"}


def test_several_labels_an_image_are_counted_and_drawn(tmp_path):
    source = Path(WRITERS["csv"](tmp_path / "set"))
    for split in ("train", "val"):
        rows = "image,label\n" + f"{split}/a.jpg,cat|dog\n{split}/b.jpg,\n{split}/c.jpg,cat\n"
        (source.parent / f"{split}.csv").write_text(rows)
    spec = opened(source, tmp_path / "cache")
    report = check(spec, list(spec.splits))
    train = report.splits[0]
    assert (train.classes, train.backgrounds, train.box_sizes) == ({"cat": 2, "dog": 1}, 1, None)
    text = write_check(report, tmp_path / "out").read_text()
    assert "Without labels" in text
    assert "Boxes of" not in text


class Sound(HTMLParser):
    """Fails where an element is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_side_of_the_input_says_nothing_of_whole_images(tmp_path, capsys):
    yaml = write_csv(tmp_path / "set")
    words = ["check", f"data={yaml}", f"data.cache_dir={tmp_path / 'set'}"]
    assert main(words) == 0
    assert main([*words, "imgsz=64"]) == 2
    assert "imgsz: 64; of whole images no box is small, leave it out" in capsys.readouterr().err


def test_nothing_is_written_unless_out_is_given(tmp_path, monkeypatch, capsys):
    yaml = write_yolo(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    words = ["check", f"data={yaml}", f"data.cache_dir={tmp_path / 'set'}", "imgsz=64"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["box_sizes"]["imgsz"] == 64
    assert [p for p in sorted(tmp_path.rglob("*")) if p.suffix == ".html"] == []
    assert {p.name for p in set(tmp_path.rglob("*")) - set(before)} <= {"headers"}
    assert main([*words, "out=seen"]) == 0
    assert (tmp_path / "seen/check.html").is_file()
