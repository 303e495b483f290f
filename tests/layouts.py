"""One small data set, written in every layout that is read."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from visiontrain.data.config import DataConfig, ShardingConfig
from visiontrain.data.open import open_dataset
from visiontrain.data.sharding import shard

NAMES = ("cat", "dog")


@dataclass
class Picture:
    name: str
    size: tuple[int, int]  # width, height
    boxes: list[tuple[int, int, int, int, int]]  # class, x1, y1, x2, y2


PICTURES = [
    Picture("a", (64, 48), [(0, 8, 4, 40, 36), (1, 0, 0, 16, 12)]),
    Picture("b", (48, 64), [(1, 4, 8, 44, 64)]),
    Picture("c", (32, 32), []),
    Picture("d", (40, 20), [(0, 10, 5, 30, 15)]),
]


def pixels(picture, seed=0):
    width, height = picture.size
    generator = np.random.default_rng((width, height, seed))
    return cv2.resize(generator.integers(0, 255, (4, 4, 3), np.uint8), (width, height))


def save(picture, folder, suffix=".jpg", seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{picture.name}{suffix}"
    file.write_bytes(cv2.imencode(suffix, pixels(picture, seed))[1].tobytes())
    return file


def yolo_row(picture, box):
    label, x1, y1, x2, y2 = box
    width, height = picture.size
    middle = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
    return f"{label} {middle[0]} {middle[1]} {(x2 - x1) / width} {(y2 - y1) / height}\n"


def write_yolo(root: Path) -> str:
    for seed, split in enumerate(("train", "val")):
        for picture in PICTURES:
            save(picture, root / "images" / split, seed=seed)
            labels = root / "labels" / split / f"{picture.name}.txt"
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text("".join(yolo_row(picture, box) for box in picture.boxes))
    text = f"train: images/train\nval: images/val\nnames: {list(NAMES)}\n"
    (root / "data.yaml").write_text(text)
    return str(root / "data.yaml")


def write_coco(root: Path) -> str:
    """Category ids 7 and 3 (not contiguous; sorted they are dog, cat), image ids from 100."""
    ids = {"cat": 3, "dog": 7}
    images, annotations = [], []
    for number, picture in enumerate(PICTURES, 100):
        width, height = picture.size
        images.append(
            {"id": number, "file_name": f"{picture.name}.jpg", "width": width, "height": height}
        )
        for label, x1, y1, x2, y2 in picture.boxes:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "category_id": ids[NAMES[label]],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": id_, "name": name} for name, id_ in reversed(ids.items())]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for split in ("train", "val"):
        for picture in PICTURES:
            save(picture, root / f"{split}2017")
        file = root / "annotations" / f"instances_{split}2017.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return str(root / "annotations" / "instances_train2017.json")


def voc_object(name, box, extra=""):
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{name}</name>{extra}<bndbox>{inner}</bndbox></object>"


def write_voc(root: Path) -> str:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        save(picture, root / "JPEGImages")
        objects = "".join(
            voc_object(NAMES[label], (x1 + 1, y1 + 1, x2, y2))
            for label, x1, y1, x2, y2 in picture.boxes
        )
        text = f"<annotation>{objects}</annotation>"
        (root / "Annotations" / f"{picture.name}.xml").write_text(text)
    for split in ("train", "val"):
        ids = "".join(f"{picture.name}\n" for picture in PICTURES)
        (root / "ImageSets/Main" / f"{split}.txt").write_text(ids)
    return str(root)


def write_digits(root: Path) -> str:
    root.mkdir(parents=True, exist_ok=True)
    text = "format: digits\ntrain: 6\nval: 4\ncanvas: 96\nheights: [20, 40]\n"
    (root / "scenes.yaml").write_text(text)
    return str(root / "scenes.yaml")


LABELS = {"a": "cat", "b": "dog", "c": "dog", "d": "cat"}  # of whole pictures


def write_folder(root: Path) -> str:
    for seed, split in enumerate(("train", "val")):
        for picture in PICTURES:
            save(picture, root / split / LABELS[picture.name], seed=seed)
    return str(root)


def write_csv(root: Path) -> str:
    for seed, split in enumerate(("train", "val")):
        for picture in PICTURES:
            save(picture, root / split, seed=seed)
        rows = "".join(f"{split}/{name}.jpg,{label}\n" for name, label in LABELS.items())
        (root / f"{split}.csv").write_text(f"image,label\n{rows}")
    (root / "data.yaml").write_text("format: csv\ntrain: train.csv\nval: val.csv\n")
    return str(root / "data.yaml")


def write_shards(root: Path) -> str:
    """The YOLO layout's pictures in their order, two tars or more for each split."""
    out = root / "tars"
    if not out.exists():
        shard(
            ShardingConfig(
                data=DataConfig(source=write_yolo(root / "pictures")),
                out=str(out),
                shard_size=0.004,
                shuffle=False,
            )
        )
    return str(out)


def write_more_shards(root, *members, content=None, cut=None):
    """Add a tar of what may be wrong to good ones that have no index."""
    folder = Path(write_shards(root))
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in members:
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    (folder / "train-more.tar").write_bytes((content or data.getvalue())[:cut])
    (folder / "data.yaml").write_text(f"format: shards\ntrain: train-*.tar\nnames: {list(NAMES)}\n")
    return str(folder)


def write_second_picture(root):
    """Add a picture to the last sample of a tar."""
    folder = Path(write_more_shards(root))
    (folder / "train-more.tar").unlink()
    with tarfile.open(folder / "train-000000.tar", "a") as tar:
        info = tarfile.TarInfo(tar.getnames()[-1].split(".")[0] + ".bmp")
        info.size = 700
        tar.addfile(info, io.BytesIO(bytes(700)))
    return str(folder)


WRITERS = {
    "yolo": write_yolo,
    "coco": write_coco,
    "voc": write_voc,
    "folder": write_folder,
    "csv": write_csv,
    "digits": write_digits,
    "shards": write_shards,
}


def opened(source, cache_dir, **settings):
    """Open `source` with every cache under `cache_dir`."""
    return open_dataset(DataConfig(source=str(source), cache_dir=str(cache_dir), **settings))
