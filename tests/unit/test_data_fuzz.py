"""No text in a label file can do more than become a defect."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visiontrain.data.build import Labels, build
from visiontrain.data.coco import Adder
from visiontrain.data.defects import DEFECTS
from visiontrain.data.images import FileImages, Paths
from visiontrain.data.scan import Scan
from visiontrain.data.voc import read_annotation
from visiontrain.data.yolo import read_rows

SIZE = (64, 48)
EXTREME = ["nan", "inf", "-inf", "1e308", "1e-320", "-0.0", "1e400", "9" * 40, "0x1", "1_0", "٣"]
NUMBER = st.one_of(st.sampled_from(EXTREME), st.floats(-2, 2).map(str), st.integers(-3, 3).map(str))
FAST = settings(max_examples=150)


def judged(labels):
    """Build the table of one image; check what every table promises."""
    images = FileImages(Paths(["a.jpg"]), 10**6)
    seen = Scan(np.array([SIZE], np.int32), ())
    table = build(("cat", "dog"), images, seen, labels, lambda _: "labels")
    assert np.isfinite(table.boxes).all()
    assert (table.boxes >= 0).all()
    assert (table.boxes <= np.tile(SIZE, 2)).all()
    assert (table.boxes[:, 2:] > table.boxes[:, :2]).all()
    assert set(table.classes.tolist()) <= {0, 1}
    assert {defect.kind for defect in table.defects} <= set(DEFECTS)
    return table


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("labels") / "a.txt"


@FAST
@given(rows=st.lists(st.lists(NUMBER | st.text(max_size=3), min_size=1, max_size=9), max_size=4))
def test_yolo_rows(rows, file):
    file.write_text("\n".join(" ".join(row) for row in rows), encoding="utf-8", errors="replace")
    labels = Labels()
    read_rows(str(file), 0, SIZE, labels)
    judged(labels)


@FAST
@given(text=st.binary(max_size=80))
def test_yolo_bytes(text, file):
    file.write_bytes(text)
    labels = Labels()
    read_rows(str(file), 0, SIZE, labels)
    judged(labels)


@FAST
@given(
    values=st.lists(NUMBER, min_size=4, max_size=4),
    name=st.sampled_from(["cat", "", "cow"]),
    noise=st.text(max_size=20),
    place=st.integers(0, 200),
)
def test_voc_annotations(values, name, noise, place, file):
    keys = ("xmin", "ymin", "xmax", "ymax")
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, values, strict=True))
    text = f"<a><object><name>{name}</name><bndbox>{corners}</bndbox></object></a>"
    text = text[:place] + noise + text[place:]
    file.write_text(text, encoding="utf-8", errors="replace")
    labels = Labels()
    read_annotation(str(file), 0, SIZE, {"cat": 0, "dog": 1}, labels)
    judged(labels)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.just(10**400),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
SIDE = st.floats() | st.integers() | JSON


@FAST
@given(
    box=st.lists(SIDE, min_size=4, max_size=4) | JSON,
    image=st.just(1) | JSON,
    category=st.just(1) | JSON,
    area=st.floats() | JSON,
    crowd=JSON,
)
def test_coco_annotations(box, image, category, area, crowd):
    item = {"bbox": box, "image_id": image, "category_id": category, "area": area}
    labels = Labels()
    adder = Adder("x.json", {1: 0}, frozenset({1}), {1: 0, 2: 1}, labels)
    adder.add(item | {"iscrowd": crowd}, 0)
    adder.add(area, 1)
    judged(labels)
