"""What `data=` finds, the quirks of YAML files it honours, and how it refuses."""

import json
from pathlib import Path

import pytest
from layouts import NAMES, PICTURES, opened, save, write_coco, write_voc, write_yolo

from visiontrain.core.errors import ConfigError, DataError, StorageError
from visiontrain.core.shipped import shipped
from visiontrain.core.yaml_loader import load_yaml
from visiontrain.data.config import DataConfig
from visiontrain.data.open import open_dataset
from visiontrain.engine.run_folder import claim

YAMLS = ("coco.yaml", "coco128.yaml")
ONE_LINE = r"^[^\n]*$"


def described(folder, text):
    """Write the YOLO layout with another data.yaml; return the reader's spec."""
    write_yolo(folder)
    (folder / "data.yaml").write_text(text)
    return opened(folder / "data.yaml", folder.parent / "cache")


def count(spec, split="train"):
    return len(spec.table(split))


@pytest.mark.parametrize(
    "text",
    [
        "train: images/train\nval: images/val\nnames: {0: cat, 1: dog}",
        "train: images/train\nvalidation: images/val\nnames: [cat, dog]\nnc: 2",
        "train: [images/train]\nval: images/val\nnames: {'1': dog, '0': cat}\nnc: '2'",
        "train: ../train.txt\nval: ../images/val\nnames: [cat, dog]",  # Roboflow's step too far
        "path: .\ntrain: train.txt\nval: images/val\nnames: [cat, dog]",
        "\ufeff# from an editor\ntrain: images/train\nval: images/val\nnames: [cat, dog]\ntest:",
    ],
)
def test_the_ways_a_yaml_says_the_same(text, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [f"./images/train/{picture.name}.jpg" for picture in PICTURES]
    (folder / "train.txt").write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    spec = described(folder, text)
    assert spec.names == NAMES
    assert set(spec.splits) == {"train", "val"}
    assert count(spec) == count(spec, "val") == len(PICTURES)
    assert len(spec.table("train").boxes) == 4


def test_names_stay_texts_and_can_be_left_to_numbers(tmp_path):
    head = "train: images/train\nval: images/val\n"
    assert described(tmp_path / "a", head + "names: [no, 1]").names == ("no", "1")
    assert described(tmp_path / "b", head + "nc: 2").names == ("class0", "class1")


def test_labels_lie_where_the_last_folder_images_becomes_labels(tmp_path):
    folder = tmp_path / "images" / "set"
    assert (
        len(described(folder, "train: images/train\nnames: [cat, dog]").table("train").boxes) == 4
    )
    beside = tmp_path / "flat"
    save(PICTURES[0], beside)
    (beside / "a.txt").write_text("1 0.5 0.5 0.5 0.5\n")
    (beside / "data.yaml").write_text("train: .\nnames: [cat, dog]\n")
    assert opened(beside, tmp_path / "cache").table("train").classes.tolist() == [1]


def test_a_folder_that_links_lead_back_to_is_read_once(tmp_path):
    described(tmp_path / "set", "train: images/train\nnames: [cat, dog]")
    folder = tmp_path / "set/images/train"
    save(PICTURES[0], folder / "deep", seed=5)
    (tmp_path / "set/labels/train/deep").mkdir()
    (tmp_path / "set/labels/train/deep/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    save(PICTURES[1], tmp_path / "apart", seed=6)
    for place, to in (
        ("again", folder),
        ("deep/up", folder),
        ("a link", folder / "deep"),
        ("elsewhere", tmp_path / "apart"),
    ):
        (folder / place).symlink_to(to)
    table = opened(tmp_path / "set", tmp_path / "cache").table("train")
    names = [table.images.name(row).split("/train/")[1] for row in range(len(table))]
    assert names == [*(f"{p.name}.jpg" for p in PICTURES), "deep/a.jpg", "elsewhere/b.jpg"]
    assert len(table.boxes) == 5  # with the label of deep/a.jpg


def test_keys_of_other_tools_are_ignored_with_a_note(tmp_path):
    extra = "download: import os; os.abort()\nroboflow: {version: 3}\nlicense: x\nminival: x\n"
    spec = described(tmp_path / "set", extra + "train: images/train\nnames: [cat, dog]")
    assert count(spec) == 4
    assert any("`download` is ignored: nothing is downloaded" in note for note in spec.notes)
    assert any("roboflow, license, minival" in note for note in spec.notes)
    asked = described(tmp_path / "named", "url: x\ntrain: images/train\nnames: [cat, dog]")
    assert not asked.notes  # it is for the error where the data are missing


HEAD = "train: images/train\n"
REFUSED = {
    "a typo in a key": (HEAD + "names: [a, b]\nvla: images/val", ConfigError, "vla"),
    "two classes of one name": (HEAD + "names: [cat, cat]", ConfigError, "both 'cat'"),
    "a class without a name": (HEAD + "names: [cat, ' ']", ConfigError, "class 1 has no name"),
    "names and nc differ": (HEAD + "names: [cat]\nnc: 2", ConfigError, "nc: 2, but 1 name;"),
    "nc is no number": (HEAD + "names: [cat]\nnc: many", ConfigError, "nc"),
    "names have a gap": (HEAD + "names: {0: cat, 2: dog}", ConfigError, "number them"),
    "no names": (HEAD, ConfigError, "names"),
    "no splits": ("names: [cat]", ConfigError, "add train: and val:"),
    "keypoints of four": (HEAD + "names: [a]\nkpt_shape: [17, 4]", ConfigError, "kpt_shape: got"),
    "an unknown format": (HEAD + "names: [cat]\nformat: yoloo", ConfigError, "yoloo"),
    "a split of the wrong type": ("train: {a: 1}\nnames: [cat]", ConfigError, "train"),
    "a list, no keys": ("- train\n- val\n", DataError, "no keys"),
    "a missing root": ("path: gone\ntrain: x\nnames: [a]", DataError, "VISIONTRAIN_DATASETS"),
    "code": ("train: !!python/object/apply:os.getcwd []\nnames: [a]", ConfigError, "data.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_description_is_one_clear_line(case, tmp_path):
    text, error, told = REFUSED[case]
    with pytest.raises(error, match=ONE_LINE) as caught:
        described(tmp_path / "set", text)
    assert told in str(caught.value)
    assert "data.yaml" in str(caught.value)


def test_a_path_of_another_machine_is_not_looked_for_elsewhere(tmp_path):
    with pytest.raises(DataError, match=r"nothing at /content/x; correct `path:`, or leave it out"):
        described(tmp_path / "set", "path: /content/x\ntrain: a\nval: b\nnames: [cat]")


def test_missing_data_is_a_data_error_that_says_where_it_looked(tmp_path):
    spec = described(tmp_path / "set", "train: gone\nval: images/val\nnames: [cat, dog]")
    with pytest.raises(DataError, match=ONE_LINE) as caught:
        spec.table("train")
    assert str(tmp_path / "set" / "gone") in str(caught.value)
    told = "no split 'test', it has train, val; add `test:` to the data set's YAML"
    with pytest.raises(DataError, match=told):
        spec.table("test")
    (tmp_path / "set/empty").mkdir()
    empty = described(tmp_path / "set", "train: empty\nval: images/val\nnames: [cat, dog]")
    with pytest.raises(DataError, match="no image in empty"):
        empty.table("train")
    with pytest.raises(DataError, match="holds no data set"):
        opened(tmp_path / "set/empty", tmp_path)
    with pytest.raises(DataError, match="did you mean 'digits'"):
        opened("digts", tmp_path)


def test_a_path_that_cannot_be_looked_at_is_one_clear_line(tmp_path):
    long = "x" * 300
    with pytest.raises(DataError, match=rf"^data: \S*{long}\S*: File name too long; give what"):
        opened(long, tmp_path)
    yaml = tmp_path / "data.yaml"
    yaml.write_text(f"train: {long}\nval: {long}\nnames: [a]\n")
    with pytest.raises(DataError, match=rf"^data: \S*{long}: File name too long; give what"):
        opened(yaml, tmp_path).table("train")
    with pytest.raises(StorageError, match="File name too long"):
        claim(long, tmp_path, "train")


def test_a_user_that_does_not_exist_is_one_clear_line(tmp_path):
    with pytest.raises(DataError, match="nothing at ~nobody-here/x"):
        opened("~nobody-here/x", tmp_path)
    write_yolo(tmp_path / "set")
    assert opened(tmp_path / "set", "~nobody-here/cache").names == NAMES


def test_relative_paths_are_tried_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VISIONTRAIN_DATASETS", str(tmp_path / "elsewhere"))
    text = "path: pets\ntrain: images/train\nnames: [cat, dog]\nurl: https://pets.example\n"
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/pets.yaml").write_text(text)
    config = DataConfig(source="apart/pets.yaml", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=ONE_LINE) as caught:
        open_dataset(config)
    apart, elsewhere = tmp_path / "apart/pets", tmp_path / "elsewhere/pets"
    told = f"nothing at {apart}, {elsewhere}, datasets/pets, pets; get it from https://pets.example"
    assert told in str(caught.value)
    # The last one found wins over the earlier: `pets` here, as Ultralytics takes it, over none.
    for folder in ("", "datasets", "elsewhere", "apart"):
        write_yolo(tmp_path / folder / "pets")
        assert open_dataset(config).root == tmp_path / folder / "pets"
    (tmp_path / "pets").rename(tmp_path / "not here")
    by_name = DataConfig(source="pets", cache_dir=str(tmp_path / "cache"))
    assert open_dataset(by_name).root == tmp_path / "elsewhere/pets"


def test_the_environment_names_the_folder_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONTRAIN_DATASETS", str(tmp_path))
    write_voc(tmp_path / "bccd")
    spec = opened("bccd", tmp_path / "cache")
    assert (spec.format, spec.root) == ("voc", tmp_path / "bccd")
    assert spec.names == ("Platelets", "RBC", "WBC")


def test_voc_lists_are_found_whatever_their_capitals_and_others_named(tmp_path):
    source = write_voc(tmp_path / "set")
    lists = tmp_path / "set/ImageSets/Main"
    (lists / "train.txt").rename(lists / "Train.txt")
    (lists / "val.txt").rename(lists / "Validation.txt")
    assert len(opened(source, tmp_path / "cache").table("val")) == len(PICTURES)
    (lists / "Train.txt").rename(lists / "default.txt")
    (lists / "Validation.txt").unlink()
    with pytest.raises(
        DataError, match=r"no train.txt in .*; there are: default; name them in a Y"
    ):
        opened(source, tmp_path / "cache")


def test_a_voc_list_may_hold_spaces_and_suffixes(tmp_path):
    source = write_voc(tmp_path / "set")
    for folder, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        for old, new in (("a", "my a"), ("b", "b.v2")):
            file = tmp_path / "set" / folder / f"{old}{suffix}"
            file.rename(file.with_name(f"{new}{suffix}"))
    text = "my a\n b.v2.JPG \nc.jpg  -1\n d  1\ngone.jpg 1\n"
    (tmp_path / "set/ImageSets/Main/train.txt").write_text(text)
    table = opened(source, tmp_path / "cache").table("train")
    names = [Path(table.images.name(row)).name for row in range(len(table))]
    assert names == ["my a.jpg", "b.v2.jpg", "c.jpg", "d.jpg"]
    assert len(table.boxes) == 4
    (defect,) = table.defects
    assert (defect.kind, Path(defect.file).name) == ("missing-image", "gone.jpg")


def test_a_yaml_in_a_voc_root_counts(tmp_path):
    source = write_voc(tmp_path / "set")
    names = NAMES[::-1]
    (tmp_path / "set/data.yaml").write_text(f"format: voc\nnames: [{', '.join(names)}]\n")
    assert opened(source, tmp_path).names == names


def test_of_equal_boxes_the_one_that_counts_stays(tmp_path):
    source = write_voc(tmp_path / "set")
    file = next(
        f for f in sorted((tmp_path / "set/Annotations").iterdir()) if "<object>" in f.read_text()
    )
    text = file.read_text()
    box = text[text.index("<object>") : text.index("</object>") + len("</object>")]
    twin = box.replace("</object>", "<difficult>1</difficult></object>")
    before = opened(source, tmp_path / "a").read("train")
    file.write_text(text.replace(box, twin + box, 1))
    after = opened(source, tmp_path / "b").read("train")
    assert after.num_ignored == before.num_ignored
    assert after.digest() == before.digest()
    file.write_text(text.replace(box, twin, 1))
    ignored = opened(source, tmp_path / "c").read("train")
    assert ignored.boxes.tolist() == before.boxes.tolist()
    assert ignored.digest() != before.digest()  # it trains on others


def test_a_voc_root_needs_no_yaml(tmp_path):
    source = write_voc(tmp_path / "set")
    spec = opened(source, tmp_path / "cache")
    assert (spec.format, spec.names, set(spec.splits)) == ("voc", NAMES, {"train", "val"})
    with pytest.raises(DataError, match=r"no split 'test'.*; add ImageSets/Main/test\.txt, or"):
        spec.table("test")
    text = f"format: voc\npath: {tmp_path}\ntrain: [set/train, set/val]\nval: set/gone\n"
    (tmp_path / "two.yaml").write_text(text + "names: [cat, dog]\n")
    spec = opened(tmp_path / "two.yaml", tmp_path / "cache")
    assert count(spec) == 2 * len(PICTURES)
    with pytest.raises(DataError, match="there are: train, val"):
        spec.table("val")


def test_a_coco_json_finds_its_siblings(tmp_path):
    train = write_coco(tmp_path / "set")
    validation = train.replace("train2017", "val2017")
    for source in (train, validation):
        spec = opened(source, tmp_path / "cache")
        assert {key: str(path) for key, path in spec.splits.items()} == {
            "train": train,
            "val": validation,
        }
    assert not spec.notes


def test_roboflow_coco_has_one_json_per_folder(tmp_path):
    source = write_coco(tmp_path / "made")
    for split in ("train", "valid"):
        for picture in PICTURES:
            save(picture, tmp_path / split)
        text = Path(source).read_text()
        (tmp_path / split / "_annotations.coco.json").write_text(text)
    spec = opened(tmp_path / "train/_annotations.coco.json", tmp_path / "cache")
    assert str(spec.splits["val"]) == str(tmp_path / "valid/_annotations.coco.json")
    assert count(spec) == count(spec, "val") == len(PICTURES)


def test_a_lone_coco_json_is_both_splits_and_says_so(tmp_path):
    for picture in PICTURES:
        save(picture, tmp_path)
    text = Path(write_coco(tmp_path / "made")).read_text()
    (tmp_path / "labels.json").write_text(text)
    spec = opened(tmp_path / "labels.json", tmp_path / "cache")
    assert set(spec.splits) == {"train", "val"}
    assert count(spec, "val") == len(PICTURES)
    assert any("same images" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"images": None}, "no list `images`"),
        ({"images": []}, "none listed"),
        ({"categories": []}, "categories: none"),
        ({"images": [{"id": 1}]}, r"images\[0\]: needs id and file_name"),
        ({"images": [{"id": "a", "file_name": "a"}]}, r"images\[0\]: id 'a'; a whole number is"),
        ({"images": [{"id": 1, "file_name": ["a"]}]}, r"\[0\]: file_name \['a'\]; a text is"),
        ({"images": [{"id": [], "file_name": "a"}]}, r"images\[0\]"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2}, "two have id 1"),
    ],
)
def test_a_broken_coco_json_is_one_clear_line(change, told, tmp_path):
    file = tmp_path / "labels.json"
    content = json.loads(Path(write_coco(tmp_path / "made")).read_text())
    file.write_text(json.dumps(content | change))
    with pytest.raises((DataError, ConfigError), match=told) as caught:
        opened(file, tmp_path / "cache").table("train")
    assert "\n" not in str(caught.value)
    assert "labels.json" in str(caught.value)


@pytest.mark.parametrize("name", sorted(path.stem for path in shipped("datasets").glob("*.yaml")))
def test_every_shipped_name_opens_or_says_where_to_put_it(name, tmp_path, monkeypatch):
    monkeypatch.delenv("VISIONTRAIN_DATASETS", raising=False)
    monkeypatch.chdir(tmp_path)
    if name in ("digits", "tiny"):
        assert set(opened(name, tmp_path).splits) == {"train", "val", "test"}
        return
    with pytest.raises(DataError, match=ONE_LINE) as caught:
        opened(name, tmp_path)
    url = load_yaml((shipped("datasets") / f"{name}.yaml").read_text(), name)["url"]
    assert url.startswith("http")
    told = f"data={name}: path: nothing at datasets/{name}, {name}; get it from {url}, put it in "
    assert str(caught.value).startswith(told)
    monkeypatch.setenv("VISIONTRAIN_DATASETS", "/sets")
    with pytest.raises(DataError, match=f"nothing at /sets/{name}, datasets/{name}, {name};"):
        opened(name, tmp_path)


def test_a_split_that_lies_here_may_be_another_data_sets(tmp_path, monkeypatch):
    write_yolo(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    spec = described(tmp_path / "set", "train: images/train\nval: images/gone\nnames: [cat, dog]")
    (tmp_path / "here/images/val").rename(tmp_path / "here/images/gone")
    with pytest.raises(DataError, match="val: nothing at"):
        spec.table("val")


def test_the_classes_of_coco_need_no_reading(tmp_path):
    """The JSON of 450 MB is read once, for its images, not before for its names."""
    coco, small = (load_yaml((shipped("datasets") / name).read_text(), name) for name in YAMLS)
    assert coco["names"] == small["names"]
    assert len(set(coco["names"])) == 80
    (tmp_path / "coco").mkdir()
    text = (shipped("datasets") / "coco.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text)
    assert opened(tmp_path / "mine.yaml", tmp_path).names == tuple(coco["names"])


def test_recommended_keys_reach_the_run(tmp_path):
    assert opened("digits", tmp_path).defaults["imgsz"] == 160
    assert not opened(write_yolo(tmp_path / "set"), tmp_path).defaults


@pytest.mark.parametrize("layout", [write_yolo, write_voc])
def test_a_list_in_another_encoding_is_one_line(layout, tmp_path):
    """As Windows PowerShell's > writes it."""
    source = Path(layout(tmp_path / "set"))
    if source.suffix == ".yaml":
        source.write_text(source.read_text().replace("images/train", "train.txt"))
        place = tmp_path / "set/train.txt"
    else:
        place = tmp_path / "set/ImageSets/Main/train.txt"
    place.write_text("a\nb\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"train.txt: cannot be read .*; save the list as UTF-8"):
        opened(source, tmp_path / "cache").table("train")
