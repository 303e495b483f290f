"""From a prepared config to a run: what every process does, and `build`, the only constructor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch

from visiontrain import __version__
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.interfaces import Progress, VisionModel
from visiontrain.core.memory import peak_rss_mb
from visiontrain.core.own import Objects, with_objects
from visiontrain.core.types import Batch, Outcome, Place
from visiontrain.data.config import sides
from visiontrain.data.defects import counted
from visiontrain.data.loader import (
    Plan,
    Scoring,
    Step,
    Training,
    eval_batches,
    resolve_workers,
    steps_per_epoch,
    train_steps,
)
from visiontrain.data.open import DataSpec, open_dataset
from visiontrain.data.order import clause, order_of
from visiontrain.data.samples import scoring_set, training_set
from visiontrain.data.table import Table
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.evaluate import Evaluation, Scorable, Trained, evaluate
from visiontrain.engine.learner import Learner, start_average
from visiontrain.engine.optim import Schedule, build_optimizer, kind_of, peak
from visiontrain.engine.parts import FitSettings, Parts, StepSource
from visiontrain.engine.predictor import filled
from visiontrain.engine.saving import Saver
from visiontrain.engine.trainer import Trainer
from visiontrain.engine.weights import Weights, WeightsMeta, load_weights
from visiontrain.loggers.console import Silent
from visiontrain.loggers.registry import build_loggers, build_progress
from visiontrain.metrics.registry import EVALUATORS
from visiontrain.models.config import OwnModel
from visiontrain.prepare import (
    config_sha256,
    folder_of,
    write_config,
)
from visiontrain.recipe import Run
from visiontrain.report.results import (
    TRAIN_BATCHES,
    Scored,
    draw,
    score_lines,
    write_results,
)
from visiontrain.start import build_fresh
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.precision import slow
from visiontrain.strategies.registry import build_strategy
from visiontrain.tasks.config import DetectConfig
from visiontrain.tasks.registry import as_task, build_task


def fit(run: Run, place: Place) -> int:
    """Train in one process of a run; return the exit code."""
    trainer = build(run, place)
    return trainer.strategy.drive(trainer).exit_code


def build(run: Run, place: Place) -> Trainer:
    """Make everything a process of a prepared run needs.

    Raises:
        VisiontrainError: when the data, the model or the mode cannot be used.
    """
    strategy = build_strategy(run.strategy, place, run.precision)
    spec, (whole, scored) = read_tables(run, ("train", "val"), strategy)
    training, validation = spec.cut(whole), scored_of(run, scored)
    progress = build_progress(run.log) if place.is_main else Silent()
    for line in spec.remarks({"train": whole, "val": scored}):
        progress.message(line)
    check_statistics(run, len(training), strategy)
    schedule = Schedule(run.optim, run.epochs, len(training), run.batch)
    goes_on = strategy.broadcast(bool(CheckpointStore(folder_of(run).checkpoints, 1)))
    model = strategy.together(lambda: build_fresh(run, spec.names, None if goes_on else progress))
    data = samples_of(run, training)
    for line in heading(run, data, validation.table, model, place):
        progress.message(line)
    learner = build_learner(run, model, spec.names, schedule, strategy)
    parts = Parts(
        learner=learner,
        steps=step_source(run, data, strategy),
        evaluate=lambda asked: score_set(run, learner, validation, asked),
        finish=lambda outcome: finish(run, outcome, strategy, validation.table, progress, data),
        saver=build_saver(run, spec, learner, len(training)),
        loggers=build_loggers(run.log) if place.is_main else [],
        progress=progress,
        begin=lambda: write_config(run) if place.is_main else None,
        config=run.model_dump(mode="json"),
    )
    return Trainer(parts, fit_settings(run, len(training)))


def check_statistics(run: Run, images: int, strategy: Strategy) -> None:
    """Refuse BatchNorm over a single number, which torch would do in the midst of a run.

    Raises:
        ConfigError: a map of one place meets a share of one image, or of none.
    """
    last = images % run.batch or min(images, run.batch)
    share = last // (strategy.micro_batches(run.accumulate) * strategy.place.shard[1])
    norm = "batch" if isinstance(run.model, OwnModel) else run.model.norm
    if norm == "batch" and share < 2 and min(sides(run.imgsz, run.augment)) == 32:
        key = "imgsz" if run.imgsz == 32 else "augment.multi_scale"
        raise ConfigError(
            f"{key}: a side of 32 pixels, where BatchNorm needs two images, but shares of an "
            f"epoch's last batch have {share}; take larger sides, another batch or model.norm=group"
        )


def read_tables(
    run: Run, splits: Sequence[str], strategy: Strategy
) -> tuple[DataSpec, Sequence[Table]]:
    """Read splits of the data on every rank, which have to see the same. Collective.

    Raises:
        DataError: on every rank, with the host that lacks the data or has other images.
    """

    def read() -> tuple[DataSpec, Sequence[Table]]:
        spec = open_dataset(run.data, run.task.kind)
        return spec, [as_task(spec.table(split), run.task) for split in splits]

    def compare() -> None:
        for split, table, (size, theirs) in zip(splits, tables, first, strict=True):
            if table.digest() != theirs:
                raise DataError(
                    f"data: {len(table)} images in {split}, rank 0 has {size}, or other labels; "
                    "put the same files on every machine"
                )

    spec, tables = strategy.together(read)
    first = strategy.broadcast([(len(table), table.digest()) for table in tables])
    strategy.together(compare)
    return spec, tables


def heading(
    run: Run, data: Training, validation: Table, model: VisionModel, place: Place
) -> list[str]:
    """Say in two lines what is about to be trained on what, and where it goes."""
    training, balance = data.table, clause(run.data, data.order)
    what = "image" if run.data.tile is None else "tile"
    given = f"{run.data.source}: {counted(len(training), what)} to train on"
    images = "" if what == "image" else " images"
    scored = f"{len(validation)}{images} to score"
    if training.task == "detect":
        scored += f", {len(training.boxes)} and {len(validation.boxes)} boxes"
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    mode = run.strategy.kind + (f" on {place.world} processes" if place.world > 1 else "")
    how = f"{kind_of(run.optim)} {peak(run.optim):g}, {run.precision}, {place.device.type}, {mode}"
    name = run.model.own.ref if isinstance(run.model, OwnModel) else run.model.kind
    lines = [
        f"{given}, {scored} of {counted(len(training.names), 'class')}{balance}",
        f"{name}, {size:.1f} M parameters, {run.imgsz} px, batch {run.batch}, {how}; "
        f"results go to {run.out}",
    ]
    stages = folder_of(run).stages
    if run.strategy.kind == "pipeline" and stages.is_file():
        lines += stages.read_text().splitlines()
    if slow(run.precision, place.device):
        lines.append(
            f"precision={run.precision}: this CPU has no instructions for it and takes several "
            "times as long as with fp32"
        )
    return lines


def build_traced(run_json: str, place: Place, objects: Objects) -> tuple[Learner, Iterator[Step]]:
    """Make what `visiontrain parity` trains with: a fresh learner and its steps."""
    run = with_objects(Run.model_validate_json(run_json), objects)
    spec = open_dataset(run.data, run.task.kind)
    table = spec.cut(spec.table("train"))
    strategy = build_strategy(run.strategy, place, run.precision)
    schedule = Schedule(run.optim, run.epochs, len(table), run.batch)
    model = build_fresh(run, spec.names, Silent())
    learner = build_learner(run, model, spec.names, schedule, strategy)
    return learner, step_source(run, samples_of(run, table), strategy)(0, frozenset())


def build_learner(
    run: Run, model: VisionModel, names: Sequence[str], schedule: Schedule, strategy: Strategy
) -> Learner:
    """Place a model, and make what trains it."""
    model.freeze(run.freeze)
    if run.recompute:
        model.recompute_blocks()
    strategy.setup(model)
    return Learner(
        strategy=strategy,
        task=build_task(run.task, len(names), run.model),
        model=model,
        optimizer=build_optimizer(run.optim, model),
        schedule=schedule,
        clip=run.optim.clip,
        seed=run.seed,
        ema=start_average(model, strategy.precision.weights) if run.ema else None,
    )


def scored_of(run: Run, table: Table) -> Scoring:
    """Return what a run is scored on."""
    most = run.task.max_det if isinstance(run.task, DetectConfig) else 0
    return scoring_set(table, run.imgsz, run.data.tiling, most)


def samples_of(run: Run, table: Table) -> Training:
    """Return what a run trains on. Small pictures are all read here."""
    order = order_of(run.data, table)
    return training_set(
        table, run.imgsz, run.augment, seed=run.seed, epochs=run.epochs, order=order
    )


def step_source(run: Run, data: Training, strategy: Strategy) -> StepSource:
    """Return what yields the steps from a first one on, leaving some out."""

    def steps(first: int, skipped: frozenset[int]) -> Iterator[Step]:
        plan = Plan(
            batch=run.batch,
            accumulate=strategy.micro_batches(run.accumulate),
            shard=strategy.place.shard,
            epochs=run.epochs,
            seed=run.seed,
            workers=loaders(run, strategy.place),
            skipped=skipped,
        )
        return train_steps(data, plan, first)

    return steps


def loaders(run: Run, place: Place) -> int:
    """Return how many processes load for this one: those of its machine share the cores."""
    return resolve_workers(run.data.workers, place.local_world or place.world)


def score_set(
    run: Run, learner: Scorable, data: Scoring, asked: Callable[[], bool] | None = None
) -> Evaluation:
    """Score the learner on a data set, unless `asked` says to stop. Collective."""
    place = learner.strategy.place
    batches = eval_batches(data, run.batch, place.shard, loaders(run, place))
    evaluator = EVALUATORS[run.task.kind](data.table)
    return evaluate(learner, batches, evaluator, asked, data.merge)


def build_saver(run: Run, spec: DataSpec, learner: Learner, images: int) -> Saver:
    """Make what writes weights and checkpoints."""
    tiling = run.data.tiling
    meta = WeightsMeta(
        task=run.task.kind,
        model=run.model.model_dump(mode="json"),
        names=list(spec.names),
        imgsz=run.imgsz,
        task_config=run.task.model_dump(mode="json"),
        tile=None if tiling is None else [tiling.side, tiling.overlap],
        config_sha256=config_sha256(run),
        version=__version__,
    )
    fixed = {
        "model": dict(meta.model),
        "names": list(meta.names),
        "images": images,
        "batch": run.batch,
        "seed": run.seed,
    }
    return Saver(learner, folder_of(run), meta, run.save, fixed)


def fit_settings(run: Run, images: int) -> FitSettings:
    """Take from the config how long to train, and when to look, score and save."""
    return FitSettings(
        epochs=run.epochs,
        steps_per_epoch=steps_per_epoch(images, run.batch),
        save=run.save,
        log_every=run.log.every,
        evaluate=run.val,
        patience=run.patience,
        hours=run.time,
    )


# -- validation ---------------------------------------------------------------------


def score(run: Run, place: Place) -> int:
    """Score `run.weights` in one process of a validation; return the exit code."""
    strategy = build_strategy(run.strategy, place, run.precision)
    weights = strategy.together(lambda: load_weights(str(run.weights)))
    spec, (table,) = read_tables(run, (run.split,), strategy)
    check_names(weights, table)
    progress = build_progress(run.log) if place.is_main else Silent()
    for line in spec.remarks({run.split: table}):
        progress.message(line)
    own = run.model.own.value if isinstance(run.model, OwnModel) else None
    model = filled(weights, str(run.weights), own)
    strategy.setup(model)
    trained = Trained(strategy, build_task(run.task, len(table.names), run.model), model)
    evaluation = score_set(run, trained, scored_of(run, table))
    outcome = Outcome(evaluation.metrics, 0, evaluation.rows)
    finish(run, outcome, strategy, table, progress)
    return 0


def check_names(weights: Weights, table: Table) -> None:
    """Refuse to score a model on a data set of other classes.

    Raises:
        ConfigError: with both lists.
    """
    theirs, ours = list(weights.meta.names), list(table.names)
    if theirs != ours:
        raise ConfigError(
            f"weights: trained on {', '.join(theirs[:8])}; data has {', '.join(ours[:8])} - "
            "score on data with the same classes in the same order"
        )


# -- the results --------------------------------------------------------------------


def finish(
    run: Run,
    outcome: Outcome,
    strategy: Strategy,
    table: Table,
    progress: Progress,
    training: Training | None = None,
) -> Mapping[str, Path]:
    """Write metrics.json, show the scores, draw the report; return the pictures.

    Collective: the memory of all processes is asked for. The main process does the rest.
    """
    peaks = strategy.gather(torch.tensor([[peak_rss_mb()]], dtype=torch.float64))
    if not strategy.place.is_main:
        return {}
    world = strategy.place.world
    peak, config = float(peaks.max()), config_sha256(run)
    scored = Scored(run, folder_of(run), table, outcome, world, peak, config)
    write_results(scored, __version__)
    for line in score_lines(scored):
        progress.message(line)
    pictures: Mapping[str, Path] = {}
    if run.log.plots:
        read = training.table if training else None
        pictures = draw(scored, read, lambda: first_batches(run, training) if training else [])
    progress.message(f"results: {scored.folder.path}")
    return pictures


def first_batches(run: Run, data: Training) -> list[Batch]:
    """Make the first batches of a run again, as one device reads them."""
    plan = Plan(batch=run.batch, epochs=run.epochs, seed=run.seed)
    return [step.micro_batches[0] for step in islice(train_steps(data, plan, 0), TRAIN_BATCHES)]
