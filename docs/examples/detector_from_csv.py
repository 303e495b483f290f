"""Train a detector on labels that lie in a CSV file.

The file has a row per box: image,x1,y1,x2,y2,label. Pictures lie beside it.
"""

import csv
import random
from collections import defaultdict
from pathlib import Path

import cv2
import visiontrain as vt


class CsvBoxes:
    """Pictures and their boxes. Anything with a length that gives samples by number will do."""

    def __init__(self, folder, pictures, boxes, names):
        self.folder, self.pictures, self.boxes, self.names = folder, pictures, boxes, names

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        picture = self.pictures[index]
        image = cv2.cvtColor(cv2.imread(str(self.folder / picture)), cv2.COLOR_BGR2RGB)
        rows = self.boxes[picture]
        return vt.Sample(
            image=image,
            boxes=[[float(row[key]) for key in ("x1", "y1", "x2", "y2")] for row in rows],
            classes=[self.names.index(row["label"]) for row in rows],
        )


folder = Path("cells")
boxes = defaultdict(list)
with open(folder / "labels.csv", newline="") as file:
    for row in csv.DictReader(file):
        boxes[row["image"]].append(row)
names = sorted({row["label"] for rows in boxes.values() for row in rows})
pictures = sorted(boxes)
random.Random(0).shuffle(pictures)
held_out = len(pictures) // 5

run = vt.train(
    data=vt.Data(
        train=CsvBoxes(folder, pictures[held_out:], boxes, names),
        val=CsvBoxes(folder, pictures[:held_out], boxes, names),
        names=names,
    ),
    epochs=2,  # 50 for a good detector
    imgsz=160,
    batch=8,
)
print(f"val mAP50-95 {run.metrics['map']:.3f}, weights in {run.weights}")
