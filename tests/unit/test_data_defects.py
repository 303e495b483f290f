"""One defective data set per row of the table of defects."""

import json
import os
import sys

import cv2
import numpy as np
import pytest
from layouts import (
    PICTURES,
    Picture,
    opened,
    save,
    voc_object,
    write_coco,
    write_more_shards,
    write_second_picture,
    write_voc,
    write_yolo,
)

from visiontrain.core.errors import DataError
from visiontrain.data.check import check
from visiontrain.data.defects import DEFECTS

GOOD_BOX = "0 0.5 0.5 0.2 0.2\n"
ALL_BOXES = 4  # of layouts.PICTURES


class Yolo:
    """A good data set, and the places where a test breaks it: image and labels of `a`."""

    def __init__(self, root):
        self.source = write_yolo(root)
        self.image = root / "images/train/a.jpg"
        self.labels = root / "labels/train/a.txt"
        self.validation = root / "images/val"

    def jpeg(self, change):
        self.image.write_bytes(change(self.image.read_bytes()))

    def rows(self, *lines):
        self.labels.write_text(GOOD_BOX + "".join(f"{line}\n" for line in lines))


def png_header(width, height):
    raw = bytearray(cv2.imencode(".png", np.zeros((8, 8), np.uint8))[1].tobytes())
    raw[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return bytes(raw)


def hollow(data):
    return data[: len(data) * 3 // 4] + b"\xff\xd9"


def same_picture_in_val(data):
    Picture("z", (64, 48), [])
    (data.validation / "z.jpg").write_bytes(data.image.read_bytes())


def saved_again_in_val(data):
    picture = cv2.imread(str(data.image))
    cv2.imwrite(str(data.validation / "z.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 40])


YOLO_CASES = {
    "missing-end": lambda data: data.jpeg(lambda raw: raw[:-2]),
    "hollow-image": lambda data: data.jpeg(hollow),
    "truncated-image": lambda data: data.jpeg(lambda raw: raw[: len(raw) * 3 // 4]),
    "corrupt-image": lambda data: data.jpeg(lambda raw: raw[:10]),
    "unknown-format": lambda data: data.jpeg(lambda raw: b"GIF89a" + raw),
    "huge-image": lambda data: data.jpeg(lambda raw: png_header(20_000, 20_000)),
    "tiny-image": lambda data: save(Picture("a", (9, 60), []), data.image.parent),
    "unreadable-labels": lambda data: data.labels.write_bytes(b"0 0.5 0.5 \xff\xfe"),
    "malformed-row": lambda data: data.rows("0 0.5 0.5 0.2"),
    "nonfinite-box": lambda data: data.rows("0 nan 0.5 0.2 0.2"),
    "negative-box": lambda data: data.rows("0 0.5 0.5 -0.2 0.2"),
    "empty-box": lambda data: data.rows("0 0.5 0.5 0 0.2"),
    "duplicate-box": lambda data: data.rows(GOOD_BOX.strip()),
    "box-outside": lambda data: data.rows("0 0.9 0.5 0.4 0.2"),
    "class-range": lambda data: data.rows("2 0.5 0.5 0.3 0.3"),
    "duplicate-image": same_picture_in_val,
    "near-duplicate": saved_again_in_val,
}
LINES = {"malformed-row", "nonfinite-box", "negative-box", "empty-box", "duplicate-box"}
LINES |= {"box-outside", "class-range"}
FOR_SCORES = {"hollow-image", "duplicate-image", "near-duplicate"}  # not looked for by a run


@pytest.mark.parametrize("kind", YOLO_CASES)
def test_a_defect_is_named_counted_and_left_out(kind, tmp_path):
    data = Yolo(tmp_path / "set")
    data.rows()
    YOLO_CASES[kind](data)
    spec = opened(data.source, tmp_path / "cache")
    report = check(spec, ["train", "val"])
    train, val = report.splits
    (defect,) = (*train.defects, *val.defects)
    assert defect.kind == kind
    assert defect.reason
    assert defect.line == (2 if kind in LINES else None)
    wanted = {data.labels.name, data.image.name, "z.jpg"}
    assert defect.file.rsplit("/", 1)[-1] in wanted
    effect = DEFECTS[kind][0]
    assert train.images == len(PICTURES) - (effect == "image dropped")
    assert report.trainable == (effect != "stops")
    if effect == "stops":
        with pytest.raises(DataError, match="class 2 is none of 0 cat, 1 dog"):
            spec.table("train")
        return
    table = spec.table("train")
    rows = [row for row in range(len(table)) if table.images.name(row).endswith("/a.jpg")]
    assert len(rows) == (effect != "image dropped")
    assert not rows or len(table.targets(rows[0])) == 1 + (effect == "clipped")


@pytest.mark.parametrize("kind", sorted(set(YOLO_CASES) - FOR_SCORES))
def test_strict_stops_where_data_would_be_lost(kind, tmp_path):
    data = Yolo(tmp_path / "set")
    data.rows()
    YOLO_CASES[kind](data)
    spec = opened(data.source, tmp_path / "cache", strict=True)
    if DEFECTS[kind][0] == "none":
        assert len(spec.table("train")) == len(PICTURES)
        return
    with pytest.raises(DataError, match=r"/a\.(jpg|txt)") as caught:
        spec.table("train")
    assert "\n" not in str(caught.value)


def coco_case(root, change):
    source = write_coco(root)
    file = root / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return source


def voc_case(root, text):
    source = write_voc(root)
    (root / "Annotations/a.xml").write_text(text)
    return source


def annotation(inner):
    return f"<annotation>{inner}</annotation>"


UNNAMED = voc_object("", (1, 1, 9, 9)).replace("<name></name>", "")
BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
OTHER_CASES = {
    "coco/missing-image": lambda root: coco_case(
        root, lambda c: c["images"].append({"id": 1, "file_name": "none.jpg"})
    ),
    "coco/unknown-image": lambda root: coco_case(
        root, lambda c: c["annotations"][0].update(image_id=5)
    ),
    "coco/class-range": lambda root: coco_case(
        root, lambda c: c["annotations"][0].update(category_id=5)
    ),
    "coco/malformed-row ": lambda root: coco_case(
        root, lambda c: c["annotations"][0].update(iscrowd="maybe")
    ),
    "coco/malformed-row": lambda root: coco_case(
        root, lambda c: c["annotations"][0].update(bbox=[1, 2, 3])
    ),
    "coco/negative-box": lambda root: coco_case(
        root, lambda c: c["annotations"][0].update(bbox=[9, 9, -5, 4])
    ),
    "coco/size-mismatch": lambda root: coco_case(root, lambda c: c["images"][0].update(width=65)),
    "voc/unreadable-labels": lambda root: voc_case(root, "<annotation><object>"),
    "voc/unreadable-labels ": lambda root: voc_case(root, BOMB + annotation("<x>&b;</x>")),
    "voc/malformed-row": lambda root: voc_case(
        root, annotation("<object><name>cat</name><bndbox><xmin>3</xmin></bndbox></object>")
    ),
    "voc/malformed-row ": lambda root: voc_case(root, annotation(UNNAMED)),
    "voc/size-mismatch": lambda root: voc_case(
        root, annotation("<size><width>1</width><height>2</height></size>")
    ),
    "voc/empty-box": lambda root: voc_case(root, annotation(voc_object("cat", (9, 9, 9, 20)))),
    "shards/missing-label": lambda root: write_more_shards(root, "x.jpg"),
    "shards/extra-picture": write_second_picture,
    "shards/missing-image": lambda root: write_more_shards(root, "x.json"),
    "shards/pickled-member": lambda root: write_more_shards(root, "x.pyd"),
    "shards/unsafe-member": lambda root: write_more_shards(root, "../x.jpg"),
    "shards/truncated-shard": lambda root: write_more_shards(root, "x.jpg", cut=900),
    "shards/unreadable-shard": lambda root: write_more_shards(root, content=b"no tar" * 200),
    "voc/missing-image": lambda root: voc_list(root, "nowhere"),
}


def voc_list(root, id_):
    source = write_voc(root)
    file = root / "ImageSets/Main/train.txt"
    file.write_text(f"{file.read_text()}{id_}\n")
    return source


@pytest.mark.parametrize("case", OTHER_CASES)
def test_defects_of_the_other_layouts(case, tmp_path):
    source = OTHER_CASES[case](tmp_path / "set")
    kind = case.split("/")[1].strip()
    table = opened(source, tmp_path / "cache").read("train")
    assert [defect.kind for defect in table.defects] == [kind]
    lost = 1 if kind == "unreadable-labels" else 0
    assert len(table) == len(PICTURES) - lost


@pytest.mark.parametrize("case", ["coco/size-mismatch", "voc/size-mismatch"])
def test_labels_of_an_image_of_another_size_are_doubtful(case, tmp_path):
    source = OTHER_CASES[case](tmp_path / "set")
    spec = opened(source, tmp_path / "cache")
    (line,) = spec.remarks({"train": spec.table("train")})
    assert "train: 1 size-mismatch; `visiontrain check data=" in line
    assert "--json` lists them all" in line
    with pytest.raises(DataError, match=r"size-mismatch.*--json` lists them all"):
        opened(source, tmp_path / "cache", strict=True).table("train")


def test_single_cls_makes_two_classes_of_one_place_one_box(tmp_path):
    data = Yolo(tmp_path / "set")
    data.rows(GOOD_BOX.strip().replace("0", "1", 1), "2 0.1 0.1 0.1 0.1")
    with pytest.raises(DataError, match="class 2 is none of 0 cat, 1 dog"):  # not hidden by it
        opened(data.source, tmp_path / "cache", single_cls=True).table("train")
    data.rows(GOOD_BOX.strip().replace("0", "1", 1))
    assert len(opened(data.source, tmp_path / "cache").table("train").targets(0)) == 2
    spec = opened(data.source, tmp_path / "cache", single_cls=True)
    assert len(spec.table("train").targets(0)) == 1
    assert check(spec, ["train"]).splits[0].classes == {"object": 3}


def test_every_kind_of_defect_has_a_case():
    others = {case.split("/")[1].strip() for case in OTHER_CASES}
    assert set(YOLO_CASES) | others == set(DEFECTS) - {"repeated-row"}  # test_data_class_layouts


def test_images_without_labels_are_background(tmp_path):
    data = Yolo(tmp_path / "set")
    data.labels.unlink()
    (report,) = check(opened(data.source, tmp_path / "cache"), ["train"]).splits
    assert (report.images, report.backgrounds, report.boxes) == (4, 2, 2)
    assert not report.defects


def test_crowd_and_difficult_are_kept_but_not_trained_on(tmp_path):
    def crowd(content):
        content["annotations"][0].update(iscrowd=1, area=17.5)

    table = opened(coco_case(tmp_path / "coco", crowd), tmp_path / "cache").table("train")
    assert table.crowd.tolist() == [True] + [False] * (ALL_BOXES - 1)
    assert table.area[0] == 17.5
    assert len(table.targets(0)) == 1
    hard = annotation(voc_object("cat", (9, 9, 20, 20), "<difficult>1</difficult>"))
    table = opened(voc_case(tmp_path / "voc", hard), tmp_path / "cache").table("train")
    assert table.difficult.tolist() == [True, False, False]
    assert len(table.targets(0)) == 0


def test_polygons_become_boxes(tmp_path):
    data = Yolo(tmp_path / "set")
    data.labels.write_text("\ufeff0 0.25 0.5 0.5 0.25 0.75 0.5 0.5 0.75\n", encoding="utf-8")
    table = opened(data.source, tmp_path / "cache").table("train")
    assert table.targets(0).tolist() == [[0, 16, 12, 48, 36, 1]]


@pytest.mark.parametrize("shape", [(12, 2), (17, 3)])  # 24 numbers, as a polygon has; 51
def test_a_pose_is_its_box(shape, tmp_path):
    data = Yolo(tmp_path / "set")
    pose = f"0 0.5 0.5 0.25 0.25{' 0.9 0.1 2'[: 4 * shape[1]] * shape[0]}"
    data.labels.write_text(f"{pose}\n1 0.25 0.25 0.5 0.5\n{pose} 0.5\n0 0 0 1 0 1 1\n")
    yaml = tmp_path / "set/data.yaml"
    yaml.write_text(f"{yaml.read_text()}kpt_shape: {list(shape)}\n")
    spec = opened(data.source, tmp_path / "cache")
    table = spec.table("train")
    assert table.targets(0)[:, :5].tolist() == [[0, 24, 18, 40, 30], [1, 0, 0, 32, 24]]
    assert [(defect.line, defect.kind) for defect in table.defects] == [
        (3, "malformed-row"),
        (4, "malformed-row"),
    ]
    told = f"7 columns; a box has 5, a pose {5 + shape[0] * shape[1]}"
    assert table.defects[1].reason.endswith(told)
    assert not spec.notes


def test_pictures_that_are_not_read_are_named_and_a_jfif_is_a_jpeg(tmp_path):
    data = Yolo(tmp_path / "set")
    data.image.rename(data.image.with_suffix(".jfif"))
    for suffix in ("gif", "HEIC", "avif", "pgm"):
        (data.image.parent / f"z.{suffix}").write_bytes(b"no matter what")
    (data.image.parent / "notes.md").write_text("no picture")
    table = opened(data.source, tmp_path / "cache").table("train")
    assert len(table) == len(PICTURES)
    assert len(table.targets(0)) == 2  # a.jfif's
    assert {(d.kind, d.file.rsplit(".")[-1]) for d in table.defects} == {
        ("unknown-format", suffix) for suffix in ("gif", "HEIC", "avif", "pgm")
    }


def test_a_data_set_without_any_usable_image_says_why(tmp_path):
    data = Yolo(tmp_path / "set")
    for image in data.image.parent.iterdir():
        image.write_bytes(image.read_bytes()[:100])
    with pytest.raises(DataError, match="no usable image: 4 corrupt-image"):
        opened(data.source, tmp_path / "cache").table("train")


def test_a_data_set_without_any_box_says_where_it_looked(tmp_path):
    data = Yolo(tmp_path / "set")
    for labels in data.labels.parent.iterdir():
        labels.unlink()
    with pytest.raises(DataError, match="no box in 4 images"):
        opened(data.source, tmp_path / "cache").table("train")


def test_a_report_is_readable_by_people_and_programs(tmp_path):
    data = Yolo(tmp_path / "set")
    data.rows(*["0 0.5 0.5 0.2"] * 5)
    report = check(opened(data.source, tmp_path / "cache"), ["train", "val"], decode=False)
    text = "\n".join(report.lines())
    assert "5 malformed-row (box dropped)" in text
    assert text.count("a.txt:") == 3  # examples
    assert "    ... and 2 more; --json lists all\n" in text
    content = json.loads(json.dumps(report.as_json()))
    assert len(content["splits"]["train"]["defects"]) == 5
    assert content["splits"]["val"]["classes"] == {"cat": 2, "dog": 2}
    assert content["trainable"]


def damage(file):
    """Spoil a PNG's body: its header and its end are fine."""
    data = bytearray(cv2.imencode(".png", np.eye(64, dtype=np.uint8) * 200)[1].tobytes())
    data[45:60] = bytes(15)
    file.with_suffix(".png").write_bytes(bytes(data))
    file.unlink()


def test_damage_that_only_decoding_finds(tmp_path):
    data = Yolo(tmp_path / "set")
    damage(data.image)
    spec = opened(data.source, tmp_path / "cache")
    assert len(spec.table("train")) == len(PICTURES)
    (report,) = check(spec, ["train"]).splits
    assert [(d.kind, d.file[-6:]) for d in report.defects] == [("truncated-image", "/a.png")]
    assert report.images == len(PICTURES) - 1
    with pytest.raises(DataError, match=r"/a\.png: a png that is truncated or damaged"):
        opened(data.source, tmp_path / "cache", strict=True).table("train")


def test_remarks_tell_what_was_left_out(tmp_path):
    data = Yolo(tmp_path / "set")
    data.rows("0 0.5 0.5 0.2", "0 nan 0.5 0.2 0.2", "0 0.5 0.5 0.2")
    spec = opened(data.source, tmp_path / "cache")
    (line,) = spec.remarks({split: spec.table(split) for split in ("train", "val")})
    assert ": train: 2 malformed-row, 1 nonfinite-box; `visiontrain check data=" in line


def test_a_split_that_is_not_there_is_its_own_problem(tmp_path):
    data = Yolo(tmp_path / "set")
    yaml = tmp_path / "set/data.yaml"
    yaml.write_text(f"{yaml.read_text()}test: ../test/images\n")  # as Roboflow writes it
    spec = opened(data.source, tmp_path / "cache")
    report = check(spec, list(spec.splits))
    assert report.trainable
    assert report.failed  # a split that was named is lost
    (line,) = (line for line in report.lines() if line.startswith("test: "))
    assert line.startswith(f"test: not read: {yaml}: test: nothing at ")
    yaml.write_text(yaml.read_text().replace("images/val", "images/gone"))
    spec = opened(data.source, tmp_path / "cache")
    assert not check(spec, list(spec.splits)).trainable


def test_only_what_a_run_reads_decides_whether_it_would_start(tmp_path):
    data = Yolo(tmp_path / "set")
    save(PICTURES[0], tmp_path / "set/images/test")
    yaml = tmp_path / "set/data.yaml"
    yaml.write_text(f"{yaml.read_text()}test: images/test\n")
    spec = opened(data.source, tmp_path / "cache")
    assert check(spec, list(spec.splits)).trainable  # nobody labelled the test images
    report = check(spec, ["train"])
    assert not report.trainable
    assert "no such split" not in "".join(report.lines())  # nobody asked
    for labels in data.labels.parent.parent.joinpath("val").iterdir():
        labels.unlink()
    assert not check(spec, list(spec.splits)).trainable


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are Unicode")
def test_a_name_that_is_no_utf8_can_be_printed(tmp_path):
    data = Yolo(tmp_path / "set")
    stem = os.fsdecode(b"\xb9")
    image = data.image.rename(data.image.with_stem(stem))
    data.labels.rename(data.labels.with_stem(stem))
    spec = opened(data.source, tmp_path / "cache")
    assert len(spec.table("train").boxes) == ALL_BOXES
    image.write_bytes(b"broken")
    report = check(spec, ["train", "val"])
    assert b"/\\udcb9.jpg: starts with" in "\n".join(report.lines()).encode()
    json.dumps(report.as_json()).encode()
