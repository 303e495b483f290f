"""From a prepared config to a run: what every process does, and `build`, the only constructor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from visiontrain import __version__
from visiontrain.core.errors import ConfigError, DataError
from visiontrain.core.interfaces import Progress, VisionModel
from visiontrain.core.memory import peak_rss_mb
from visiontrain.core.own import Objects, objects_of, with_objects
from visiontrain.core.types import Batch, Outcome, Place
from visiontrain.data.loader import (
    Plan,
    Scoring,
    Step,
    Training,
    blank_steps,
    eval_batches,
    resolve_workers,
    steps_per_epoch,
    train_steps,
)
from visiontrain.data.open import DataSpec, open_dataset
from visiontrain.data.order import order_of
from visiontrain.data.samples import scoring_set, training_set
from visiontrain.data.table import Table
from visiontrain.dealing import (
    class_counts,
    dealt,
    line_of,
    own_part,
    paced_of,
    served,
    splits_of,
)
from visiontrain.engine.checkpoint import CheckpointStore
from visiontrain.engine.evaluate import Evaluation, Scorable, Trained, evaluate
from visiontrain.engine.learner import Learner, start_average
from visiontrain.engine.optim import Schedule, build_optimizer, no_optimizer
from visiontrain.engine.parts import FitSettings, Parts, StepSource
from visiontrain.engine.predictor import filled
from visiontrain.engine.saving import Saver
from visiontrain.engine.trainer import Trainer
from visiontrain.engine.weights import Weights, WeightsMeta, load_weights
from visiontrain.heading import heading
from visiontrain.loggers.console import Silent
from visiontrain.loggers.registry import build_loggers, build_progress
from visiontrain.metrics.registry import EVALUATORS
from visiontrain.models.config import OwnModel
from visiontrain.prepare import (
    config_sha256,
    folder_of,
    write_config,
)
from visiontrain.recipe import Run, scored_at_once
from visiontrain.report.results import (
    TRAIN_BATCHES,
    Scored,
    draw,
    score_lines,
    write_results,
)
from visiontrain.start import build_fresh, check_statistics
from visiontrain.strategies.base import Strategy
from visiontrain.strategies.config import Client
from visiontrain.strategies.devices import started_by
from visiontrain.strategies.environment import bound
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.handover import on_cpu
from visiontrain.strategies.registry import build_strategy
from visiontrain.strategies.remote import Remote
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
    remote = remote_of(run, place)
    strategy = build_strategy(run.strategy, place, run.precision, remote)
    elsewhere, splits = served(run), splits_of(run)
    spec, tables = read_tables(run, splits, strategy)
    # Where all images to train on lie with clients, those to score give the loop its length.
    training = own_part(run, spec.cut(tables[0]), tables[-1])
    validation = scored_of(run, tables[-1])
    remote.tell(spec.names, len(training), training.digest())
    progress = build_progress(run.log) if place.is_main else Silent()
    for line in spec.remarks(dict(zip(splits, tables, strict=True))):
        progress.message(line)
    count = len(training)  # may be fewer than a batch
    schedule = Schedule(run.optim, run.epochs, count, min(run.batch, count))
    paced = paced_of(run, len(training))
    goes_on = strategy.broadcast(bool(CheckpointStore(folder_of(run).checkpoints, 1)))
    model = strategy.together(lambda: build_fresh(run, spec.names, None if goes_on else progress))
    if not isinstance(run.strategy, Federated):
        check_statistics(run, model, len(training), strategy)
    data = samples_of(run, training)
    for line in heading(run, None if elsewhere else data, validation.table, model, place):
        progress.message(line)
    if isinstance(run.strategy, Federated) and not elsewhere:
        rows, _ = dealt(run, training, validation.table)
        for images in sorted({len(own) for own in rows}):
            check_statistics(run, model, images, strategy)
        progress.message(line_of(rows, run.strategy.partition))
        strategy.describe(class_counts(training, rows))
    learner = build_learner(run, model, spec.names, schedule, strategy)
    parts = Parts(
        learner=learner,
        steps=step_source(paced, data, strategy, run.save.every_steps),
        evaluate=lambda asked: score_set(run, learner, validation, asked),
        finish=lambda outcome: finish(
            run, outcome, strategy, validation.table, progress, None if elsewhere else data
        ),
        saver=build_saver(run, spec, learner, training),
        loggers=build_loggers(run.log) if place.is_main else [],
        progress=progress,
        begin=lambda: write_config(run) if place.is_main else None,
        config=run.model_dump(mode="json"),
    )
    return Trainer(parts, fit_settings(paced, len(training)))


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


def build_traced(run_json: str, place: Place, objects: Objects) -> tuple[Learner, Iterator[Step]]:
    """Make what `visiontrain parity` trains with: a fresh learner and its steps."""
    run = with_objects(Run.model_validate_json(run_json), objects)
    spec = open_dataset(run.data, run.task.kind)
    splits = ("train", "val") if isinstance(run.strategy, Client) else ("train",)
    tables = [as_task(spec.table(split), run.task) for split in splits]
    table = own_part(run, spec.cut(tables[0]), tables[-1])
    remote = remote_of(run, place, traced=True)
    remote.tell(spec.names, len(table), table.digest())
    strategy = build_strategy(run.strategy, place, run.precision, remote)
    count = len(table)
    schedule = Schedule(run.optim, run.epochs, count, min(run.batch, count))
    model = build_fresh(run, spec.names, Silent())
    learner = build_learner(run, model, spec.names, schedule, strategy)
    return learner, step_source(run, samples_of(run, table), strategy, 1)(0, frozenset())


def build_learner(
    run: Run,
    model: VisionModel,
    names: Sequence[str],
    schedule: Schedule,
    strategy: Strategy,
    *,
    updates: bool = True,
) -> Learner:
    """Place a model, and make what trains it; without `updates` only as far as gradients."""
    model.freeze(run.freeze)
    if run.recompute:
        model.recompute_blocks()
    strategy.setup(model)
    return Learner(
        strategy=strategy,
        task=build_task(run.task, len(names), run.model),
        model=model,
        optimizer=build_optimizer(run.optim, model) if updates else no_optimizer(model),
        schedule=schedule,
        clip=run.optim.clip,
        seed=run.seed,
        ema=start_average(model, strategy.precision.weights) if run.ema else None,
    )


def remote_of(run: Run, place: Place, *, traced: bool = False) -> Remote:
    """Return what processes are told that a mode starts itself, as far as it is known."""
    scratch = None if traced else folder_of(run).servers
    text, objects = run.model_dump_json(), {k: on_cpu(v) for k, v in objects_of(run).items()}
    return Remote(text, "visiontrain.worker", scratch, objects, place.device.type, traced)


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


def step_source(run: Run, data: Training, strategy: Strategy, saved: int | None) -> StepSource:
    """Return what yields the steps from a first one on, leaving some out.

    Args:
        run: the config.
        data: what is trained on.
        strategy: says which share of it is read here.
        saved: after how many steps something is saved, beside the end of an epoch.
    """
    per_epoch = steps_per_epoch(len(data), run.batch)

    def rests(step: int, skipped: frozenset[int]) -> bool:
        after = step + 1
        while True:  # steps that are left out hide no rest
            if not after % per_epoch or (saved and not after % saved):
                return True
            if after not in skipped:
                return False
            after += 1

    def steps(first: int, skipped: frozenset[int]) -> Iterator[Step]:
        plan = replace(plan_of(run, strategy), skipped=skipped)
        return strategy.steps(
            lambda: train_steps(data, plan, first),
            lambda: blank_steps(data, plan, first),
            lambda step: rests(step, skipped),
        )

    return steps


def plan_of(run: Run, strategy: Strategy) -> Plan:
    """Return how a run's samples are cut, and which of them are read here."""
    return Plan(
        batch=run.batch,
        accumulate=strategy.micro_batches(run.accumulate),
        shard=strategy.place.shard,
        epochs=run.epochs,
        seed=run.seed,
        workers=loaders(run, strategy.place),
    )


def loaders(run: Run, place: Place) -> int:
    """Return how many processes load for this one: those of its machine share the cores."""
    here = place.local_world or place.world
    return resolve_workers(run.data.workers, 1 if bound(here) else here)


def score_set(
    run: Run, learner: Scorable, data: Scoring, asked: Callable[[], bool] | None = None
) -> Evaluation:
    """Score the learner on a data set, unless `asked` says to stop. Collective."""
    place, batch = learner.strategy.place, run.batch
    if not isinstance(learner, Trained):  # a validation was told how many at a time
        batch = scored_at_once(run.batch, run.accumulate, run.imgsz)
    batches = eval_batches(data, batch, place.shard, loaders(run, place))
    evaluator = EVALUATORS[run.task.kind](data.table)
    return evaluate(learner, batches, evaluator, asked, data.merge)


def build_saver(run: Run, spec: DataSpec, learner: Learner, training: Table) -> Saver:
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
        "model": run.model.model_dump(mode="json", exclude={"own"}),
        "names": list(meta.names),
        "images": len(training),
        "labels_sha256": training.digest(),
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
        verb="federated server" if served(run) else "train",
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
    del weights  # the model has copies of all of them
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
    peaks = strategy.peaks(peak_rss_mb())
    if not strategy.place.is_main:
        return {}
    world = strategy.place.world
    if training is not None:
        world = started_by(run.strategy) or world
    scored = Scored(run, folder_of(run), table, outcome, world, peaks, config_sha256(run))
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
