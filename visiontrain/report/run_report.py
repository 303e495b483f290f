"""report.html: what a run did, on one page, made of nothing but the files in its folder."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from visiontrain.data.defects import counted
from visiontrain.loggers.csv import read_rows
from visiontrain.report.meanings import MEANINGS, has_several, meanings_of
from visiontrain.report.page import Content, Html, html, page, table, tag
from visiontrain.report.pictures import CONFIDENCE
from visiontrain.report.plots import OVERLAP

CARDS = ("top1", "top5", "balanced", "map", "map50", "precision", "recall")
CAPTIONS = {  # of plots/, in the order shown; names end in .png
    "results": "Losses, scores, learning rate and speed over epochs.",
    "clients": "The images of each client, by the class that each has most boxes of, and scores on "
    "images of its own.",
    "servers": "How many updates came between a gradient's weights and itself, and what workers' "
    "time went into.",
    "pr_curve": "Precision by recall: the area under a curve is its average precision.",
    "f1_curve": "F1 by confidence: its highest point is the confidence to use.",
    "precision_curve": "Precision by confidence: how much of what is left is right, 1 for a class "
    "of which nothing is left.",
    "recall_curve": "Recall by confidence: how much is still found.",
    "confusion_matrix": "What was found (row) where what is (column), as counts, at confidence "
    f"{CONFIDENCE} and overlap {OVERLAP}.",
    "confusion_matrix_normalized": "The same as shares of each column: the diagonal is what was "
    "found and named right.",
    "calibration": "How often predictions of a confidence are right: on the line, confidence is "
    "what it says.",
    "examples": "Predicted classes of single pictures, with their confidence; first the mistakes "
    "that were made most surely.",
    "labels": "What the labels hold: boxes per class, where they lie, how large they are.",
    "train_batch": "Training images as the model sees them, with their labels.",
    "val_predictions": "Labels, and to the right of each the predictions scored above "
    f"{CONFIDENCE}.",
}
OF_CLASSES = CAPTIONS | {
    "confusion_matrix": "What images are taken for (row) by what they are (column), as counts.",
    "confusion_matrix_normalized": "The same as shares of each column: the diagonal is right.",
    "labels": "Images of each class, and how large images are.",
}
OF_SEVERAL = OF_CLASSES | {
    "examples": "Pictures at even distances, with the classes said at a half or more.",
}
LARGE = 400_000  # bytes of a PNG from which the page holds a JPEG of it
UNREADABLE = (OSError, ValueError)  # of pictures: PIL raises both


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What was found in a run folder."""

    folder: Path
    config: str | None  # config.yaml as it is
    settings: Mapping[str, Any]  # the same, read; empty where it can't be
    metrics: Mapping[str, Any]  # metrics.json, empty where there is none
    epochs: Sequence[Mapping[str, str]]  # rows of results.csv
    plots: Sequence[Path]
    notes: Sequence[str]  # what is missing or can't be read, one sentence each


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from config.yaml, results.csv, metrics.json and plots/*.png.

    The page holds its pictures, loads nothing and runs no script. A file that is missing or
    can't be read is named on the page.

    Returns:
        The path of the page.
    """
    files = read_files(folder)
    sections = (_headline, _repeat, _scores, _classes, _pictures, _facts)
    body = [section(files) for section in sections]
    path = folder / "report.html"
    draft = path.with_suffix(".html.part")
    # A folder's name need not be UTF-8.
    draft.write_text(page(_title(files), body), encoding="utf-8", errors="replace")
    draft.replace(path)
    return path


def read_files(folder: Path) -> RunFiles:
    """Read what a report is made of."""
    notes: list[str] = []
    config = _text(folder / "config.yaml", notes)
    raw = _text(folder / "metrics.json", notes)
    plots = sorted((folder / "plots").glob("*.png"), key=_order)
    if not plots:
        notes.append("plots/ holds no picture.")
    return RunFiles(
        folder=folder,
        config=config,
        settings=_mapping("config.yaml", yaml.safe_load, config, notes),
        metrics=_mapping("metrics.json", json.loads, raw, notes),
        epochs=_epochs(folder / "results.csv", notes),
        plots=plots,
        notes=notes,
    )


def _text(path: Path, notes: list[str]) -> str | None:
    if not path.is_file():
        notes.append(f"{path.name} is missing.")
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _epochs(path: Path, notes: list[str]) -> Sequence[Mapping[str, str]]:
    if not path.is_file():
        notes.append(f"{path.name} is missing: nothing is known of single epochs.")
    try:
        return read_rows(path)
    except (ValueError, csv.Error) as error:
        notes.append(f"{path.name} can't be read: {error}.")
        return []


def _mapping(name: str, read: Any, text: str | None, notes: list[str]) -> Mapping[str, Any]:
    try:
        value = read(text) if text else {}
    except (ValueError, yaml.YAMLError) as error:
        notes.append(f"{name} can't be read: {str(error).splitlines()[0]}.")
        return {}
    return value if isinstance(value, dict) else {}


def _order(path: Path) -> tuple[int, str]:
    known = list(CAPTIONS)
    return known.index(_kind(path)) if _kind(path) in known else len(known), path.name


def _kind(path: Path) -> str:
    """Return which plot a file is: `train_batch` of train_batch_0.png."""
    return path.stem.rstrip("0123456789").rstrip("_")


# -- sections -------------------------------------------------------------------------


def _title(files: RunFiles) -> str:
    name = files.folder.resolve().name
    parts = [_setting(files, "model", "kind"), _setting(files, "data", "source")]
    what = " on ".join(part for part in parts if part)
    return f"{name}: {what}" if what else name


def _setting(files: RunFiles, section: str, key: str) -> str | None:
    value = files.settings.get(section)
    value = value.get(key) if isinstance(value, dict) else value
    return str(value) if value is not None else None


def _headline(files: RunFiles) -> Content:
    """Say the result in words and large numbers."""
    meanings = meanings_of(files.metrics)
    cards = [
        tag("div", [tag("b", show(files.metrics[key])), meanings[key][0]], {"class": "card"})
        for key in CARDS
        if _finite(files.metrics.get(key)) is not None
    ]
    return [
        tag("h1", _title(files)),
        [tag("p", line, {"class": "note"}) for line in files.notes],
        tag("div", cards, {"class": "cards"}) if cards else None,
        [tag("p", sentence) for sentence in in_words(files)],
    ]


def in_words(files: RunFiles) -> list[str]:
    """Say what came out, one sentence each."""
    metrics, said = files.metrics, []
    recall, precision, conf = (_finite(metrics.get(k)) for k in ("recall", "precision", "conf"))
    split = metrics.get("split", "validation")
    top1, every = _finite(metrics.get("top1")), _finite(metrics.get("images"))
    if top1 is not None and every is not None:
        said.append(f"Of the {every:,.0f} {split} images, {top1:.1%} are classified right.")
    if recall is not None and precision is not None and metrics.get("task") != "classify":
        where = f" (at confidence {conf:.2g})" if conf is not None else ""
        said.append(
            f"Of the objects in the {split} images, {recall:.0%} are found; of what is reported, "
            f"{precision:.0%} is right{where}, averaged over classes."
        )
    scored = sorted(
        (value, name)
        for name, scores in _per_class(files).items()
        for value in [_finite(scores.get("map"))]
        if value is not None
    )
    if len(scored) > 1:
        (worst, worst_name), (best, best_name) = scored[0], scored[-1]
        score = meanings_of(metrics)["map"][0]
        said.append(
            f"The class found best is '{best_name}' ({score} {best:.3f}), the one found "
            f"worst '{worst_name}' ({worst:.3f})."
        )
    return said + _effort(files)


def _effort(files: RunFiles) -> list[str]:
    """Say how long the run was, and when it was best."""
    metrics, said = files.metrics, []
    seconds, epochs = _finite(metrics.get("seconds")), _finite(metrics.get("epochs"))
    if seconds is not None and epochs:
        speed = _finite(metrics.get("train_images_per_s"))
        pace = f", {speed:,.0f} training images per second" if speed else ""
        by = f" with strategy {metrics['strategy']}" if "strategy" in metrics else ""
        counts = (
            counted(int(epochs), "epoch"),
            counted(int(_finite(metrics.get("processes")) or 1), "process"),
        )
        said.append(f"The run took {duration(seconds)} for {counts[0]}{by}, {counts[1]}{pace}.")
    best = "top1" if "top1" in metrics else "map"
    scored = {row.get("epoch"): _finite(row.get(f"val/{best}")) for row in files.epochs}
    epoch = str(metrics.get("best_epoch"))
    value = scored.get(epoch)
    if value is not None and sum(other is not None for other in scored.values()) > 1:
        score = f"{meanings_of(metrics)[best][0]} {value:.3f}"
        said.append(f"The best epoch was {epoch} of {len(files.epochs)} ({score}).")
    return said


def _repeat(files: RunFiles) -> Content:
    if files.config is None:
        return None
    verb = "train" if files.epochs else "val"
    command = f"visiontrain {verb} {shlex.quote(str(files.folder / 'config.yaml'))}"
    return [tag("h2", "Repeat it"), tag("pre", command)]


def _scores(files: RunFiles) -> Content:
    rows = [
        (name, show(files.metrics[key]), meaning)
        for key, (name, meaning) in meanings_of(files.metrics).items()
        if key in files.metrics
    ]
    if not rows:
        return None
    why = "A dash means that no label decides the score, as when there are no small boxes."
    return [
        tag("h2", "Scores"),
        table(("Score", "Value", "Meaning"), rows, [1]),
        tag("p", why, {"class": "soft"}),
    ]


def _classes(files: RunFiles) -> Content:
    classes = _per_class(files)
    if not classes:
        return None
    meanings = meanings_of(files.metrics)
    keys = list(dict.fromkeys(key for scores in classes.values() for key in scores))
    head = ["Class", *(meanings.get(key, (key.capitalize(), ""))[0] for key in keys)]
    rows = [
        [name, *(_bar(key, scores.get(key)) for key in keys)] for name, scores in classes.items()
    ]
    return [tag("h2", "Classes"), table(head, rows, range(1, len(head)))]


def _bar(key: str, value: Any) -> Content:
    """Return a number, the first score with a bar beside it."""
    number = _finite(value)
    if key != "map" or number is None:
        return show(value)
    bar = tag("meter", attributes={"value": f"{number:.4f}", "min": "0", "max": "1"})
    return [show(value), bar]


def _per_class(files: RunFiles) -> dict[str, Mapping[str, Any]]:
    classes = files.metrics.get("per_class")
    if not isinstance(classes, dict):
        return {}
    return {str(name): scores for name, scores in classes.items() if isinstance(scores, dict)}


def _pictures(files: RunFiles) -> Content:
    if not files.plots:
        return None
    curves = [path for path in files.plots if _kind(path).endswith("_curve")]
    curves += [path for path in files.plots if _kind(path).startswith("confusion_")]
    other = [path for path in files.plots if path not in curves]
    captions = _captions(files.metrics)
    first = [_figure(path, captions) for path in other if _kind(path) == "results"]
    rest = [_figure(path, captions) for path in other if _kind(path) != "results"]
    return [
        tag("h2", "Pictures"),
        first,
        tag("div", [_figure(path, captions) for path in curves], {"class": "pair"}),
        rest,
    ]


def _captions(metrics: Mapping[str, Any]) -> Mapping[str, str]:
    if metrics.get("task") != "classify":
        return CAPTIONS
    return OF_SEVERAL if has_several(metrics) else OF_CLASSES


def _figure(path: Path, captions: Mapping[str, str]) -> Html:
    try:
        return figure_of(path, captions.get(_kind(path), path.stem.replace("_", " ")))
    except UNREADABLE:
        return tag("p", f"{path.name} can't be read as a picture.", {"class": "note"})


def figure_of(path: Path, caption: str) -> Html:
    """Return a picture with a caption; raises as `inline`."""
    image = tag("img", attributes={"src": inline(path), "alt": caption, "loading": "lazy"})
    return tag("figure", [image, tag("figcaption", caption)])


def inline(path: Path) -> str:
    """Return a picture as a data URL: PNG as it is, a large one as JPEG.

    Raises:
        OSError, ValueError: it can't be read as a picture.
    """
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        if len(data) > LARGE:
            smaller, kind = io.BytesIO(), "jpeg"
            picture.convert("RGB").save(smaller, "JPEG", quality=85)
            data = smaller.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _facts(files: RunFiles) -> Content:
    """Show what else metrics.json says, and the whole configuration."""
    shown = {*MEANINGS, "per_class", "names", "versions"}
    rows = [(key, show(value)) for key, value in files.metrics.items() if key not in shown]
    versions = files.metrics.get("versions")
    if isinstance(versions, dict):
        rows += [(f"version of {name}", str(value)) for name, value in versions.items()]
    config = [tag("summary", "config.yaml"), tag("pre", files.config)] if files.config else None
    return [
        tag("h2", "Run") if rows or config else None,
        table(("", ""), rows, []) if rows else None,
        tag("details", config) if config else None,
        tag("p", html("Made by visiontrain from the files of this folder."), {"class": "soft"}),
    ]


# -- numbers --------------------------------------------------------------------------


def _finite(value: Any) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def show(value: Any) -> str:
    """Write a value for people; what is not known is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def duration(seconds: float) -> str:
    """Write a time for people: `47 s`, `5 min 3 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
