"""What a run that is over leaves: metrics.json, detections, plots and report.html."""

from __future__ import annotations

import logging
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visiontrain.core.errors import VisiontrainError
from visiontrain.core.types import Batch, Outcome
from visiontrain.data.defects import counted
from visiontrain.data.table import Table
from visiontrain.engine.run_folder import RunFolder
from visiontrain.recipe import Run
from visiontrain.report.detections import write_json
from visiontrain.strategies.devices import threads_started

PAIR = {"precision": "P", "recall": "R"}
COLUMNS = {  # of the table at the end, by what is scored: keys of metrics.json and titles
    "detect": {"images": "images", "boxes": "boxes", **PAIR, "map50": "mAP50", "map": "mAP50-95"},
    "classify": {"images": "images", "top1": "top-1", "top5": "top-5", **PAIR, "f1": "F1"},
    "several": {"images": "images", **PAIR, "f1": "F1", "map": "mAP"},
}
MOST_CLASSES = 20  # in the table at the end
TRAIN_BATCHES = 3  # drawn as the model sees them
_warn = logging.getLogger(__name__).warning


@dataclass(frozen=True, slots=True)
class Scored:
    """A split and its scores."""

    run: Run
    folder: RunFolder
    table: Table
    outcome: Outcome
    processes: int
    peaks_rss_mb: Sequence[float]  # of each process
    config_sha256: str  # of its config.yaml


def write_results(scored: Scored, version: str) -> None:
    """Write metrics.json first, then detections.json or scores.json when `save_json` asks for it.

    Raises:
        StorageError: when they cannot be written.
    """
    run, table, rows = scored.run, scored.table, scored.outcome.rows
    scored.folder.write_metrics(summary(scored, version))
    if run.save_json and rows is not None:
        if table.task == "detect":
            write_json(scored.folder.path / "detections.json", coco_results(table, rows))
        else:
            write_json(scored.folder.path / "scores.json", class_results(table, rows))


def summary(scored: Scored, version: str) -> dict[str, Any]:
    """Return what metrics.json holds."""
    run, table = scored.run, scored.table
    missed = unreadable(scored)
    return {
        "task": run.task.kind,
        "split": run.split,
        "images": len(table) - missed,
        **({"unreadable": missed} if missed else {}),
        "names": list(table.names),
        **scored.outcome.metrics,
        "strategy": run.strategy.kind,
        "processes": scored.processes,
        # Of the processes that trained, where this one only led them.
        "threads": threads_started(run.strategy) or torch.get_num_threads(),
        "peak_rss_mb": round(max(scored.peaks_rss_mb), 1),
        "peaks_rss_mb": [round(peak, 1) for peak in scored.peaks_rss_mb],
        "seed": run.seed,
        "config_sha256": scored.config_sha256,
        "versions": {
            "visiontrain": version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def unreadable(scored: Scored) -> int:
    """Return how many images were left out of a classifier's scores, as damaged.

    In a detector's they count as images in which nothing was found.
    """
    rows = scored.outcome.rows
    if scored.table.task == "detect" or rows is None:
        return 0
    return len(scored.table) - len(rows[:, 0].unique())


def score_lines(scored: Scored) -> list[str]:
    """Write the scores as an aligned table: all classes together, then each that occurs."""
    metrics, table = scored.outcome.metrics, scored.table
    classes = {n: c for n, c in metrics.get("per_class", {}).items() if c.get("boxes", c["images"])}
    every = {
        **metrics,
        "images": len(table) - unreadable(scored),
        "boxes": sum(row.get("boxes", 0) for row in classes.values()),
    }
    columns = COLUMNS["several" if table.several else table.task]
    shown = list(classes.items())[:MOST_CLASSES]
    rows = [("all", every), *(shown if len(classes) > 1 else [])]
    width = max(len("class"), *(len(name) for name, _ in rows))
    head = f"{'class':<{width}}" + "".join(f" {title:>9}" for title in columns.values())
    lines = [head, *(f"{name:<{width}}" + _cells(row, columns) for name, row in rows)]
    left = len(classes) - len(shown)
    return [*lines, *([f"... {counted(left, 'more class')}: metrics.json"] if left else [])]


def _cells(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    values = (row.get(key) for key in columns)
    texts = (_cell(value) for value in values)
    return "".join(f" {text:>9}" for text in texts)


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def coco_results(table: Table, rows: Tensor) -> list[dict[str, Any]]:
    """Turn rows (K, 7) into COCO's results format, with the name of each one's file.

    Ids are those of the user's COCO JSON, so that it scores them; else rows and classes.
    """
    images, categories = table.image_ids, table.category_ids
    return [
        {
            "image_id": int(image if images is None else images[int(image)]),
            "file_name": table.images.name(int(image)),
            "category_id": int(label if categories is None else categories[int(label)]),
            "bbox": [round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
            "score": round(score, 6),
        }
        for image, x1, y1, x2, y2, score, label in rows.tolist()
    ]


def class_results(table: Table, rows: Tensor) -> list[dict[str, Any]]:
    """Turn a classifier's rows into what can be read: the likeliest classes, or all scores."""
    if table.several:
        return [
            {
                "file_name": table.images.name(int(image)),
                "scores": dict(zip(table.names, (round(s, 6) for s in scores), strict=True)),
            }
            for image, *scores in rows.tolist()
        ]
    return [
        {
            "file_name": table.images.name(int(image)),
            "score": round(sure, 6),
            "likeliest": [table.names[int(label)] for label in best],
        }
        for image, sure, _, *best in rows.tolist()
    ]


def draw(
    scored: Scored, training: Table | None = None, batches: Callable[[], list[Batch]] | None = None
) -> Mapping[str, Path]:
    """Draw plots and report.html; what cannot be drawn costs a warning, not the run.

    Args:
        scored: the split that was scored.
        training: what was trained on; None after a mere validation.
        batches: makes its first batches.

    Returns:
        The pictures by name.
    """
    try:
        paths = _plots(scored, training, batches)
    except (VisiontrainError, OSError, ValueError) as error:
        _warn("plots: %s; the run is complete without them", error)
        return {}
    return {path.stem: path for path in paths}


def _plots(
    scored: Scored, training: Table | None, batches: Callable[[], list[Batch]] | None
) -> list[Path]:
    from visiontrain.report.class_plots import class_label_plot, class_plots  # noqa: PLC0415
    from visiontrain.report.client_plots import clients_plot  # noqa: PLC0415
    from visiontrain.report.pictures import batch_picture  # noqa: PLC0415 - matplotlib: seconds
    from visiontrain.report.plots import label_plot, results_plot, scored_plots  # noqa: PLC0415
    from visiontrain.report.run_report import write_report  # noqa: PLC0415
    from visiontrain.report.server_plots import servers_plot  # noqa: PLC0415

    folder, table = scored.folder, scored.table
    plots = folder.path / "plots"
    plots.mkdir(exist_ok=True)
    paths = []
    if scored.outcome.rows is not None:
        by_task = scored_plots if table.task == "detect" else class_plots
        paths += by_task(table, scored.outcome.rows, plots)
    if training is not None:
        paths.append(results_plot(folder.results, plots / "results.png"))
        if "stalenesses" in scored.outcome.metrics:
            paths.append(servers_plot(scored.outcome.metrics, plots / "servers.png"))
        if "clients" in scored.outcome.metrics:
            clients = scored.outcome.metrics["clients"]
            paths.append(clients_plot(clients, training.names, plots / "clients.png"))
        labels = label_plot if training.task == "detect" else class_label_plot
        paths.append(labels(training, plots / "labels.png"))
    for number, batch in enumerate(batches() if batches else []):
        path = plots / f"train_batch{number}.png"
        paths.append(batch_picture(batch, table.names, path, whole=table.task == "classify"))
    write_report(folder.path)
    return paths
