"""The predict verb: find objects in pictures and videos, draw them, write them down."""

from __future__ import annotations

import json
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from visiontrain.core.errors import ConfigError, DataError, StorageError
from visiontrain.core.own import NONE, Objects
from visiontrain.core.types import LIKELY, ClassScores, Detections, Place, Prediction
from visiontrain.data.defects import counted
from visiontrain.data.inputs import Input, find_inputs
from visiontrain.data.shots import Shot, ShotReader, portions
from visiontrain.data.walk import PREDICTIONS
from visiontrain.engine.classifier import Classifier
from visiontrain.engine.detector import Detector
from visiontrain.engine.pictures import Pixels
from visiontrain.engine.predictor import load_predictor, model_config
from visiontrain.engine.run_folder import RunFolder, claim, home
from visiontrain.engine.signals import Signals, unsaved
from visiontrain.engine.weights import WeightsMeta, load_weights
from visiontrain.models.config import ModelConfig
from visiontrain.predict_config import DetectorConfig, PredictConfig, Spread, Stages
from visiontrain.report.predictions import ShotWriter, write_predictions
from visiontrain.staging import check_uses
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import DDP, Pipeline, Single, StrategyConfig
from visiontrain.strategies.devices import settle
from visiontrain.strategies.registry import build_strategy

Say = Callable[[str], None]  # shows one line to a person
SHOWN = 5  # classes that the last line names
DECODING = ("conf", "iou", "nms", "max_det")
FAINT = 0.001  # a score that nobody misses; suppressing all below takes seconds an image


@dataclass(frozen=True, slots=True)
class Predicted:
    """What a prediction left."""

    folder: Path
    rows: list[dict[str, Any]]  # as in predictions.json: file_name, width, height, boxes
    unreadable: list[str]  # one reason per file that was left out
    seconds: float  # reading, forward passes and writing; not loading the weights
    conf: float = 0.0  # least score of what counts as found
    best: float = 0.0  # highest score of all, found or not
    exit_code: int = 0  # 0 complete; 128 + signal when one ended it, and `rows` are those before

    @property
    def objects(self) -> int:
        """Return how many objects were found."""
        return sum(len(row.get("boxes", ())) for row in self.rows)

    def summary(self) -> str:
        """Say in one line how many images, objects, images per second, and where."""
        speed = len(self.rows) / max(self.seconds, 1e-9)
        left_out = f", {len(self.unreadable)} unreadable left out" if self.unreadable else ""
        images = counted(len(self.rows), "image")
        if self.rows and "classes" in self.rows[0]:
            return f"{images}{left_out}, {self._likeliest()}, {speed:.1f} images/s: {self.folder}"
        objects = counted(self.objects, "object")
        if not self.objects:  # not found, or nearly?
            nearest = f"the best score was {self.best:.2g}" if self.best else "all are below 0.001"
            objects += f" above conf={self.conf:g} ({nearest})"
        return f"{images}{left_out}, {objects}, {speed:.1f} images/s: {self.folder}"

    def _likeliest(self) -> str:
        """Say which class an image most likely shows, or in how many each is the likeliest.

        Of several labels: in how many each is more likely than not.
        """
        if "several" in self.rows[0]:
            first = [i for row in self.rows for i in row["classes"] if i["score"] >= LIKELY]
        else:
            first = [row["classes"][0] for row in self.rows]
        if not first:
            return f"no class of {LIKELY} or more"
        if len(self.rows) == 1:
            return ", ".join(f"{i['name']} (score {i['score']:.2f})" for i in first[:SHOWN])
        found = Counter(item["name"] for item in first).most_common()
        shown = [f"{number:,} {name}" for name, number in found[:SHOWN]]
        more = sum(number for _, number in found[SHOWN:])
        return ", ".join([*shown, *([f"{more:,} of others"] if more else [])])


def load(
    config: DetectorConfig, objects: Objects = NONE, strategy: Strategy | None = None
) -> Detector | Classifier:
    """Read the weights that `config` names, ready for use on its device.

    Args:
        config: which weights, and how to use them.
        objects: of the user's: a model of their own, where the weights are of one.
        strategy: as for `load_predictor`.

    Raises:
        CheckpointError: when the weights can't be used.
        ConfigError: when there is no such device.
    """
    decoding = {key: getattr(config, key) for key in DECODING}
    return load_predictor(
        config.weights,
        decoding,
        imgsz=config.imgsz,
        device=config.device,
        model=objects.get("model.own"),
        tile=config.tile,
        overlap=config.overlap,
        max_pixels=config.max_pixels,
        strategy=strategy,
    )


# -- before any process starts ----------------------------------------------------------


def prepare_prediction(
    config: PredictConfig, folder: RunFolder | None = None, objects: Objects = NONE
) -> PredictConfig:
    """Check what can be checked at once, claim the folder: `out` of the result.

    Args:
        config: what was asked for.
        folder: claimed already, by processes that torchrun started again since.
        objects: as for `load`.

    Raises:
        VisiontrainError: the source, the weights, the mode or the folder cannot be used.
    """
    mode = settle(mode_of(config), config.device)
    inputs = find_inputs(config.source)
    if config.vid_stride > 1 and not any(item.is_video for item in inputs):
        raise ConfigError(f"vid_stride: {config.vid_stride}; there is no film, leave it out")
    weights = load_weights(config.weights)
    task = weights.meta.task
    described = check_decoding(config, weights.meta, objects)
    if isinstance(mode, Pipeline):
        check_uses(mode, described, len(weights.meta.names), task)
    if task == "classify" and config.save_json:
        raise ConfigError(
            "save_json: COCO has no results of classes; predictions.json is always written"
        )
    folder = folder or claim(config.out, home(config.project) / task, config.name)
    folder.path.mkdir(parents=True, exist_ok=True)  # where nothing was found the first time
    changes: dict[str, Any] = {"out": str(folder.path)}
    if not isinstance(mode, Single):
        kind = type(config.strategy)
        changes["strategy"] = kind(**mode.model_dump(include=set(kind.model_fields)))
    return config.model_copy(update=changes)


def check_decoding(
    config: DetectorConfig, meta: WeightsMeta, objects: Objects = NONE
) -> ModelConfig:
    """Refuse keys of detections that change nothing with these weights; return their model.

    Raises:
        CheckpointError: this version does not know the model.
        ConfigError: naming the key, or the user's model that is missing.
    """
    described = model_config(meta, config.weights, objects.get("model.own"))
    given = [key for key in DECODING if key in config.model_fields_set]
    if given and meta.task == "classify":
        value = getattr(config, given[0])
        raise ConfigError(f"{given[0]}: {value}; weights that classify whole images, leave it out")
    if "nms" in config.model_fields_set and not config.nms and described.suppressed:
        raise ConfigError("nms: false; this model has no scores without suppression, leave it out")
    merged = config.nms or described.suppressed
    if not merged and config.iou != DetectorConfig.model_fields["iou"].default:
        raise ConfigError(f"iou: {config.iou}; it changes nothing without nms; add nms=true")
    return described


def mode_of(config: PredictConfig) -> StrategyConfig:
    """Return the training mode whose processes predict."""
    mode = config.strategy
    match mode:
        case Spread():
            return DDP(**mode.model_dump(exclude_unset=True))
        case Stages():
            return Pipeline(**mode.model_dump(exclude_unset=True))
    return mode


def folder_of(config: PredictConfig) -> RunFolder:
    """Return the folder of a prepared prediction."""
    return RunFolder(Path(config.out or "."))


def to_text(config: PredictConfig) -> str:
    """Write a config as JSON in ASCII: names of files need not be UTF-8, which pydantic's is."""
    return json.dumps(config.model_dump())


def from_text(text: str) -> PredictConfig:
    """Read what `to_text` wrote."""
    return PredictConfig.model_validate(json.loads(text))


# -- in every process ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Share:
    """What one process found, beside the files it wrote."""

    rows: Sequence[tuple[int, dict[str, Any]]]  # place of the input, what was found
    unreadable: Sequence[tuple[int, str]]  # place of the input, reason
    best: float
    seconds: float
    signal: int  # that ended it; 0 for none


def predict_share(config: PredictConfig, place: Place, objects: Objects) -> int:
    """Predict in one process of a prepared prediction; return the exit code.

    Raises:
        VisiontrainError: the weights can't be used, or the results not written.
    """
    mode = mode_of(config)
    strategy = build_strategy(mode, place, "fp32")
    # Fainter ones are asked for too, to tell how near the rest came.
    asked = {"conf": min(config.conf, FAINT), "device": str(place.device)}
    staged = isinstance(mode, Pipeline)  # else each process holds the model, and runs it alone
    predictor = load(config.model_copy(update=asked), objects, strategy if staged else None)
    if isinstance(predictor, Detector):
        predictor = replace(predictor, least=config.conf)
    inputs = agreed(find_inputs(config.source), strategy)
    reader = ShotReader(inputs, config.batch, config.vid_stride, config.max_pixels)
    writer = ShotWriter(config, place.rank, predictor.names, inputs)
    index, total = place.shard
    shots = reader.batches(portions(inputs, config.batch)[index::total])
    began, best = time.perf_counter(), 0.0
    with Signals() as signals, closing(writer):
        with kept_for_last(alone=place.world == 1) as failure:
            for batch in in_step(shots, strategy, signals):
                images = [shot.pixels for shot in batch]
                found = looked(predictor, images, config.batch) if batch else []
                for shot, said in zip(batch, found, strict=True) if strategy.holds_outputs else ():
                    best = max([best, *said.scores.tolist()])
                    writer.add(shot, above(said, config.conf))
        writer.close()  # a film can be played even if what follows fails
        seconds = time.perf_counter() - began
        left_out = reader.unreadable if strategy.holds_outputs else ()  # all of a pipeline read
        share = Share(writer.rows, left_out, best, seconds, signals.received)
        shares = gathered(share, strategy)
        if place.is_main:
            write_shares(config, predictor, shares)
        strategy.any(flag=False)  # wait for the main process: a crash of its costs nothing
        writer.discard()
    for error in failure:
        raise error
    received = max(share.signal for share in shares)
    return unsaved(received) if received else 0


@contextmanager
def kept_for_last(*, alone: bool) -> Iterator[list[StorageError]]:
    """Keep what cannot be written for later: first, what was found is to be saved.

    Of several processes, the others would wait for this one.
    """
    failure: list[StorageError] = []
    try:
        yield failure
    except StorageError as error:
        if not alone:
            raise
        failure.append(error)


def agreed(inputs: Sequence[Input], strategy: Strategy) -> list[Input]:
    """Return the main process's list: a folder may change while the others look."""
    own = {item.name: item for item in inputs}
    listed = strategy.broadcast([(str(item.path), item.name) for item in inputs])
    return [own.get(name) or Input(Path(path), name) for path, name in listed]


def in_step(
    batches: Iterator[list[Shot]], strategy: Strategy, signals: Signals
) -> Iterator[list[Shot]]:
    """Yield this process's batches, none when it has no more, until all are done or one stops.

    So no process waits at the end for longer than a batch takes, which may be hours of film.
    """
    while True:
        batch = next(batches, None)
        votes = torch.tensor([batch is not None, signals.received > 0], dtype=torch.float64)
        busy, stopped = strategy.sum(votes).tolist()
        if stopped or not busy:
            return
        check_same(batch or [], strategy)
        yield batch or []


def check_same(batch: Sequence[Shot], strategy: Strategy) -> None:
    """Refuse that processes of a pipeline have read other pictures. Collective.

    They would wait for each other, or end in the midst of a picture: none is told the shapes.

    Raises:
        DataError: on every process.
    """
    index, total = strategy.place.shard
    if total == strategy.place.world:
        return
    read = "\n".join(f"{shot.name} {shot.pixels.shape}" for shot in batch)
    mine = torch.tensor([[index, zlib.crc32(read.encode(errors="surrogateescape"))]])
    if len(strategy.gather(mine).unique(dim=0)) > total:
        raise DataError(
            "source: the processes of a pipeline read other pictures of one batch; put the same "
            "files on every machine"
        )


def gathered(share: Share, strategy: Strategy) -> list[Share]:
    """Return the shares of all processes, which travel as JSON. Collective."""
    line = json.dumps(asdict(share)).encode() + b"\n"
    rows = torch.frombuffer(bytearray(line), dtype=torch.uint8)[:, None]
    lines = strategy.gather(rows).numpy().tobytes().splitlines()
    return [Share(**json.loads(text)) for text in lines]


def looked(
    predictor: Detector | Classifier, images: list[Pixels], batch: int
) -> Sequence[Prediction]:
    """Predict on pictures by one forward pass, or one of each `batch` tiles."""
    if isinstance(predictor, Detector):
        return predictor.detect(images, batch)
    return predictor.classify(images)


def above(found: Prediction, conf: float) -> Prediction:
    """Return the detections, best first, that are scored `conf` or higher, or scores of classes."""
    if isinstance(found, ClassScores):
        return found
    count = int((found.scores >= conf).sum())
    return Detections(
        found.boxes[:count], found.scores[:count], found.classes[:count], found.names[:count]
    )


# -- the result -----------------------------------------------------------------------------


def write_shares(
    config: PredictConfig, detector: Detector | Classifier, shares: Sequence[Share]
) -> None:
    """Write what all processes found, in the order of the inputs, and metrics.json about it."""
    folder = folder_of(config)
    rows = in_order([share.rows for share in shares])
    write_predictions(config, folder.path, detector.names, rows)
    seconds = max(share.seconds for share in shares)
    folder.write_metrics(
        {
            "task": detector.kind,
            "images": len(rows),
            "objects": sum(len(row.get("boxes", ())) for row in rows),
            "unreadable": in_order([share.unreadable for share in shares]),
            "conf": config.conf,
            "best": max(share.best for share in shares),
            "seconds": seconds,
            "images_per_s": len(rows) / max(seconds, 1e-9),
            "strategy": config.strategy.kind,
            "processes": len(shares),
        }
    )


def in_order(parts: Sequence[Sequence[tuple[int, Any]]]) -> list[Any]:
    """Put (place, value) pairs of all processes in the order of their places."""
    pairs = sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])
    return [value for _, value in pairs]


def read_result(config: PredictConfig, exit_code: int) -> Predicted:
    """Read what a prediction left; nothing where a signal ended it before it began."""
    folder = folder_of(config)
    if not folder.metrics.is_file():
        return Predicted(folder.path, [], [], 0.0, config.conf, exit_code=exit_code)
    told = json.loads(folder.metrics.read_text(encoding="utf-8"))
    rows = json.loads((folder.path / PREDICTIONS).read_text(encoding="utf-8"))["images"]
    numbers = told["seconds"], config.conf, told["best"]
    return Predicted(folder.path, rows, told["unreadable"], *numbers, exit_code)
