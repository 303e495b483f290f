"""What a run says of itself before it begins."""

from __future__ import annotations

from visiontrain.core.interfaces import VisionModel
from visiontrain.core.types import Place
from visiontrain.data.defects import counted
from visiontrain.data.loader import Training
from visiontrain.data.order import clause
from visiontrain.data.table import Table
from visiontrain.engine.optim import kind_of, peak
from visiontrain.models.config import OwnModel
from visiontrain.prepare import folder_of
from visiontrain.recipe import Run
from visiontrain.strategies.devices import world
from visiontrain.strategies.precision import slow

OF_SGD = 0.01  # from here on rates are those of SGD, as of YOLO tools' lr0


def heading(
    run: Run, data: Training | None, validation: Table, model: VisionModel, place: Place
) -> list[str]:
    """Say in two lines what is about to be trained on what, and where it goes.

    Args:
        run: the config.
        data: what is trained on; None where clients elsewhere have it.
        validation: what is scored.
        model: the whole one, or what this process holds of it.
        place: of this process.
    """
    balance = "" if data is None else clause(run.data, data.order)
    what = "image" if run.data.tile is None else "tile"
    number = "clients' images" if data is None else counted(len(data.table), what)
    given = f"{run.data.source}: {number} to train on"
    images = "" if what == "image" else " images"
    scored = f"{len(validation)}{images} to score"
    if validation.task == "detect":
        boxes = "" if data is None else f"{len(data.table.boxes)} and "
        scored += f", {boxes}{len(validation.boxes)} boxes"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    mode, count = run.strategy.kind, max(place.world, world(run.strategy))
    mode += f" on {count} processes" if count > 1 else ""
    how = f"{kind_of(run.optim)} {peak(run.optim):g}, {run.precision}, {place.device.type}, {mode}"
    name = run.model.own.ref if isinstance(run.model, OwnModel) else run.model.kind
    lines = [
        f"{given}, {scored} of {counted(len(validation.names), 'class')}{balance}",
        f"{name}, {_millions(size)} M parameters, {run.imgsz} px, batch {run.batch}, {how}; "
        f"results go to {run.out}",
    ]
    stages = folder_of(run).stages
    if run.strategy.kind == "pipeline" and stages.is_file():
        lines += stages.read_text().splitlines()
    if slow(run.precision, place.device):
        lines.append(
            f"precision={run.precision}: this CPU is not known to have instructions for it, and "
            "may take several times as long as with fp32"
        )
    if run.data.cache == "ram" and place.world > 1:
        lines.append(
            f"data.cache=ram keeps a copy in each of {place.world} processes; data.cache=disk is "
            "one file for all of a machine"
        )
    if kind_of(run.optim) == "adamw" and peak(run.optim) >= OF_SGD:
        lines.append(
            f"optim.lr={peak(run.optim):g} is a rate for SGD (optimizer=sgd); adamw usually takes "
            "0.002, as by default"
        )
    return lines


def _millions(size: float) -> str:
    """Write a size in millions, also that of a tiny model."""
    return f"{size:.1f}" if size >= 0.1 else f"{size:.2g}"
