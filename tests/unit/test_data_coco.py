"""COCO JSON as exporters really write it: folders, ids, flags, categories that are none."""

import json
from pathlib import Path

import pytest
from layouts import NAMES, PICTURES, opened, save, write_coco

from visiontrain.core.errors import ConfigError, DataError
from visiontrain.data.check import check


def changed(root, change, splits=("train",)):
    """Write the COCO layout, change the JSON of `splits`, and open it."""
    source = write_coco(root)
    for split in splits:
        file = root / f"annotations/instances_{split}2017.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
    return opened(source, root.parent / "cache")


def boxes_by_name(table):
    """Return what the table says in words, whatever the numbers of its classes."""
    names = [table.names[label] for label in table.classes]
    return sorted(zip(names, table.boxes.tolist(), strict=True))


def test_images_are_looked_for_where_most_of_them_are(tmp_path):
    source = write_coco(tmp_path / "set")
    folder = tmp_path / "set/train2017"
    (folder / "a.jpg").unlink()  # the first one
    save(PICTURES[1], tmp_path / "set/annotations")  # a stray copy, where is looked first
    table = opened(source, tmp_path / "cache").table("train")
    assert [Path(table.images.name(row)) for row in range(len(table))] == [
        folder / f"{name}.jpg" for name in "bcd"
    ]
    assert [defect.kind for defect in table.defects] == ["missing-image"]
    for image in folder.iterdir():
        image.unlink()
    (tmp_path / "set/annotations/b.jpg").unlink()
    with pytest.raises(DataError, match=r"none of its images, such as a\.jpg, in .*train2017"):
        opened(source, tmp_path / "cache").table("train")


def test_few_images_of_many_are_found(tmp_path):
    def many(content):
        content["images"] += [{"id": n, "file_name": f"{n}.jpg"} for n in range(1000, 1500)]

    table = changed(tmp_path / "set", many).table("train")
    assert len(table) == len(PICTURES)


@pytest.mark.parametrize("count", [2, 1])  # one: of a folder that is also here
@pytest.mark.parametrize(
    "folder", ["C:\\Users\\ann\\set\\", "D:/set/", "/home/ann/set/", "\\\\nas\\set\\", ""]
)
def test_names_that_another_machine_wrote_are_found(folder, count, tmp_path):
    separator = "\\" if "\\" in folder or not folder else "/"

    def elsewhere(content):
        for n, image in enumerate(content["images"]):
            image["file_name"] = f"{folder}{n % count}{separator}{image['file_name']}"

    spec = changed(tmp_path / "set", elsewhere)
    for n, picture in enumerate(PICTURES):
        (tmp_path / f"set/train2017/{picture.name}.jpg").unlink()
        save(picture, tmp_path / f"set/train2017/{n % count}")
    table = spec.table("train")
    found = [Path(table.images.name(row)).parts[-2:] for row in range(len(table))]
    assert found == [(str(n % count), f"{picture.name}.jpg") for n, picture in enumerate(PICTURES)]


def test_a_class_without_a_box_is_told(tmp_path):
    def without_dogs(content):
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 7]

    spec = changed(tmp_path / "set", without_dogs)
    (told,) = spec.remarks({"train": spec.table("train")})
    assert told.endswith("train: no box of dog")
    assert not spec.remarks({"val": spec.table("val")})


def test_a_missing_split_concerns_only_who_reads_it(tmp_path):
    write_coco(tmp_path / "set")
    lines = [f"{split}: annotations/instances_{split}2017.json" for split in ("train", "val")]
    text = "\n".join(["format: coco", *lines, "test: annotations/gone.json"])
    (tmp_path / "set/data.yaml").write_text(text)
    spec = opened(tmp_path / "set", tmp_path / "cache")
    assert len(spec.table("train")) == len(PICTURES)
    with pytest.raises(DataError, match=r"test: nothing at .*gone\.json"):
        spec.table("test")
    report = check(spec, list(spec.splits))
    assert report.trainable
    assert "gone.json" in report.as_json()["splits"]["test"]["problem"]


ROBOFLOW = [  # the project, listed as its classes' supercategory, and in older exports as a class
    {"id": 0, "name": "pets", "supercategory": "none"},
    {"id": 3, "name": "cat", "supercategory": "pets"},
    {"id": 7, "name": "dog", "supercategory": "pets"},
]


def with_categories(*categories):
    return lambda content: content.update(categories=list(categories))


@pytest.mark.parametrize(
    ("categories", "told"),
    [
        (ROBOFLOW, "0 'pets'"),
        ([ROBOFLOW[0] | {"name": "cat"}, *ROBOFLOW[1:]], "0 'cat'"),
        ([*ROBOFLOW[1:], {"id": 9, "name": "dog"}], "9 'dog'"),
    ],
)
def test_a_category_that_only_heads_others_is_no_class(categories, told, tmp_path):
    spec = changed(tmp_path / "set", with_categories(*categories), ("train", "val"))
    table = spec.table("train")
    assert spec.names == table.names == NAMES
    expected = changed(tmp_path / "plain", lambda content: None).table("train")
    assert boxes_by_name(table) == boxes_by_name(expected)
    assert table.category_ids.tolist() == [3, 7]
    (note,) = spec.notes
    assert note.endswith(f"left out categories without an annotation: {told}")
    assert note in check(spec, ["train"]).lines()


def test_a_category_that_any_split_uses_stays(tmp_path):
    spec = changed(tmp_path / "set", with_categories(*ROBOFLOW), ("train", "val"))
    file = tmp_path / "set/annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    spec = opened(spec.source, tmp_path / "cache")
    assert spec.names == ("pets", *NAMES)
    assert not spec.notes
    assert spec.table("val").classes[0] == 0


def test_its_own_supercategory_and_no_annotation_make_a_class_all_the_same(tmp_path):
    own = [{"id": i, "name": name, "supercategory": name} for i, name in ((3, "cat"), (7, "dog"))]
    unused = {"id": 8, "name": "cow", "supercategory": "cow"}
    assert changed(tmp_path / "set", with_categories(*own, unused)).names == (*NAMES, "cow")


def test_two_used_categories_of_one_name_are_refused(tmp_path):
    both = [{"id": 3, "name": "pet"}, {"id": 7, "name": "pet"}]
    with pytest.raises(ConfigError, match="both 'pet'"):
        changed(tmp_path / "set", with_categories(*both))


@pytest.mark.parametrize(("zero", "one"), [(0, 1), (0.0, 1.0), ("0", "1"), (False, True)])
def test_a_crowd_is_marked_in_many_ways(zero, one, tmp_path):
    def mark(content):
        for number, item in enumerate(content["annotations"]):
            item["iscrowd"] = one if number == 0 else zero
        content["annotations"][1]["iscrowd"] = None

    table = changed(tmp_path / "set", mark).table("train")
    assert table.crowd.tolist() == [True, False, False, False]
    assert not table.defects


@pytest.mark.parametrize("value", ["no", 2, -1, [1], {}, "", 0.5])
def test_what_is_neither_crowd_nor_not_is_no_box(value, tmp_path):
    spec = changed(tmp_path / "set", lambda c: c["annotations"][0].update(iscrowd=value))
    table = spec.table("train")
    assert len(table.boxes) == 3
    (defect,) = table.defects
    assert defect.kind == "malformed-row"
    assert defect.reason == f"annotations[0]: iscrowd {value!r}; 0 or 1 is needed"


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    def as_floats(content):
        for item in content["annotations"]:
            item.update(category_id=float(item["category_id"]), image_id=float(item["image_id"]))
        content["images"][0]["id"] = 100.0
        content["categories"][0]["id"] = 7.0

    table = changed(tmp_path / "set", as_floats).table("train")
    assert (len(table.boxes), list(table.defects)) == (4, [])
    assert table.image_ids.tolist() == [100, 101, 102, 103]
    spec = changed(tmp_path / "half", lambda c: c["annotations"][0].update(category_id=3.5))
    with pytest.raises(DataError, match=r"category_id 3\.5 is none of"):
        spec.table("train")


def test_ids_of_the_file_stay_with_their_rows(tmp_path):
    source = write_coco(tmp_path / "set")
    (tmp_path / "set/train2017/b.jpg").write_bytes(b"broken")
    spec = opened(source, tmp_path / "cache")
    table = spec.table("train")
    assert table.image_ids.tolist() == [100, 102, 103]
    assert table.category_ids.tolist() == [3, 7]
    one = opened(source, tmp_path / "cache", single_cls=True, train_images=2).table("train")
    assert len(one.image_ids) == len(one) <= 2
    assert one.category_ids is None


def test_a_class_that_the_file_lacks_has_no_id(tmp_path):
    write_coco(tmp_path / "set")
    text = "format: coco\ntrain: annotations/instances_train2017.json\nnames: [cow, dog, cat]\n"
    (tmp_path / "set/data.yaml").write_text(text)
    table = opened(tmp_path / "set", tmp_path / "cache").table("train")
    assert table.category_ids.tolist() == [-1, 7, 3]


def test_boxes_that_are_all_crowds_are_nothing_to_train_on(tmp_path):
    def crowds(content):
        for item in content["annotations"]:
            item["iscrowd"] = 1

    spec = changed(tmp_path / "set", crowds, ("train", "val"))
    with pytest.raises(DataError, match="no box to train on in 4 images: 4 boxes, all crowd or"):
        spec.table("train")
    assert len(spec.table("val").boxes) == 4  # scores ignore them
    report = check(spec, ["train", "val"])
    assert not report.trainable
    assert "4 boxes (4 crowd or difficult)" in report.lines()[1]


def roboflow(root, *splits):
    """Write one folder per split, with its JSON beside the images."""
    text = Path(write_coco(root.parent / "made")).read_text()
    for split in splits:
        for picture in PICTURES:
            save(picture, root / split)
        (root / split / "_annotations.coco.json").write_text(text)


def test_a_folder_of_cocos_layout_is_its_json_to_train_on(tmp_path):
    source = Path(write_coco(tmp_path / "set"))
    for kind in ("captions", "person_keypoints"):  # what else COCO's own folder holds
        (source.parent / f"{kind}_train2017.json").write_text("{}")
    (source.parent / "._instances_train2017.json").write_text("from a Mac")
    spec = opened(tmp_path / "set", tmp_path / "cache")
    whole = opened(source, tmp_path / "cache")
    assert (spec.format, spec.names, spec.splits) == ("coco", NAMES, whole.splits)
    for split in ("train", "val"):
        assert boxes_by_name(spec.table(split)) == boxes_by_name(whole.table(split))


def test_a_folder_of_roboflows_layout_is_its_json_to_train_on(tmp_path):
    roboflow(tmp_path / "set", "train", "valid", "test")
    for folder in ("set", "set/train"):
        spec = opened(tmp_path / folder, tmp_path / "cache")
        files = {split: str(Path(path).parent.name) for split, path in spec.splits.items()}
        assert files == {"train": "train", "val": "valid", "test": "test"}
        assert len(spec.table("val")) == len(PICTURES)


def test_splits_are_found_whatever_their_capitals(tmp_path):
    """CVAT names its subsets Train and Validation."""
    source = Path(write_coco(tmp_path / "set"))
    named = {"train2017": "Train", "val2017": "Validation"}
    for old, new in named.items():
        source.with_name(f"instances_{old}.json").rename(source.with_name(f"instances_{new}.json"))
    for place in (tmp_path / "set", source.with_name("instances_Train.json")):
        splits = opened(place, tmp_path / "cache").splits
        assert {split: Path(path).stem for split, path in splits.items()} == {
            "train": "instances_Train",
            "val": "instances_Validation",
        }


def test_a_folder_with_one_json_of_no_split_is_that_json(tmp_path):
    source = Path(write_coco(tmp_path / "set"))
    for picture in PICTURES:
        save(picture, tmp_path / "set/images")
    source.with_name("instances_val2017.json").unlink()
    source.rename(source.with_name("instances_default.json"))  # as CVAT writes it
    spec = opened(tmp_path / "set", tmp_path / "cache")
    assert len(spec.table("train")) == len(PICTURES)
    assert any("same images" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("val.json",), "holds 1 COCO JSON, such as annotations/val.json; give the JSON"),
        (("a_train.json", "b_train.json"), "2 COCO JSONs, such as annotations/a_train.json, ann"),
        (("a.json", "b.json", "val.json"), "holds 3 COCO JSONs, such as annotations/a.json, ann"),
        ((), "holds no data set; looked for data.yaml, data.yml, dataset.yaml, COCO's annot"),
    ],
)
def test_a_folder_whose_json_cannot_be_told_is_one_line(names, told, tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in names:
        (tmp_path / "annotations" / name).write_text("{}")
    with pytest.raises(DataError, match=r"^data: [^\n]*$") as caught:
        opened(tmp_path, tmp_path / "cache")
    assert told in str(caught.value)
