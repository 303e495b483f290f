"""The formats that data sets are read from."""

from __future__ import annotations

from collections.abc import Callable

from visiontrain.data.coco import CocoReader
from visiontrain.data.csv import CsvReader
from visiontrain.data.description import Description, Reader
from visiontrain.data.digits import DigitReader
from visiontrain.data.folder import FolderReader
from visiontrain.data.shards import ShardReader
from visiontrain.data.voc import VocReader
from visiontrain.data.yolo import YoloReader

FORMATS: dict[str, Callable[[Description], Reader]] = {
    "yolo": YoloReader,
    "coco": CocoReader,
    "voc": VocReader,
    "folder": FolderReader,
    "csv": CsvReader,
    "digits": DigitReader,
    "shards": ShardReader,
}
