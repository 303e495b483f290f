"""What ranks run in tests: a small detector's learner and steps, whole or with a mistake."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from visiontrain.core.types import Loss, Place
from visiontrain.data.class_dataset import LabelledTraining
from visiontrain.data.config import AugmentConfig, ClassifyAugment
from visiontrain.data.dataset import TrainSet
from visiontrain.data.description import Choice
from visiontrain.data.digits import Recipe, compose, single_digits
from visiontrain.data.loader import Plan, train_steps
from visiontrain.engine.config import OptimConfig
from visiontrain.engine.learner import Learner, start_average
from visiontrain.engine.optim import Schedule, build_optimizer
from visiontrain.engine.parity import trace
from visiontrain.models.config import ModelConfig
from visiontrain.models.registry import build_model
from visiontrain.strategies import comm, ddp
from visiontrain.strategies.config import DDP, FSDP, Client, Pipeline, Placement, Single
from visiontrain.strategies.member import share_of
from visiontrain.strategies.registry import build_strategy
from visiontrain.tasks.config import TaskConfig
from visiontrain.tasks.detect import DetectTask
from visiontrain.tasks.registry import build_task

CPU = torch.device("cpu")
MODES = {
    "single": Single,
    "ddp": DDP,
    "fsdp": FSDP,
    "pipeline": Pipeline,
    "placement": Placement,
    "client": Client,
}
SIDE, SORTED = 64, 32  # of scenes, of digits to classify
# The last batch of an epoch has 3 images, so that a rank gets none of its second micro-batch.
IMAGES, BATCH, ACCUMULATE, EPOCHS = 24, 7, 2, 2
STEPS = 8
DATA = {"images": IMAGES, "batch": BATCH, "bare": []}  # bare: rows whose boxes are taken away


def make_learner(place, run):
    """Make a learner of yolo_n from a run's few settings that differ between tests."""
    data = DATA | run.get("data", {})
    torch.manual_seed(run.get("seed", 0))
    task = TypeAdapter(TaskConfig).validate_python({"kind": "detect", **run.get("task", {})})
    keys = {"kind": "yolo_n", "norm": run.get("norm", "group"), **run.get("model", {})}
    config = TypeAdapter(ModelConfig).validate_python(keys)
    model = build_model(config, 10, task.kind)
    stir(model)
    model.freeze(run.get("freeze", 0))
    if run.get("recompute"):
        model.recompute_blocks()
    mode = MODES[run["strategy"]["kind"]](**run["strategy"])
    strategy = build_strategy(mode, place, run["precision"])
    strategy.setup(model)
    if run.get("synced"):
        synchronise(model)
    optim = OptimConfig(**run["optim"])
    return Learner(
        strategy=strategy,
        task=build_task(task, 10, config),
        model=model,
        optimizer=build_optimizer(optim, model),
        schedule=Schedule(optim, EPOCHS, data["images"], data["batch"]),
        clip=optim.clip,
        seed=0,
        ema=start_average(model, strategy.precision.weights),
    )


def stir(model):
    """Give frozen norms statistics as training leaves them: fresh ones change nothing."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            for shift in (module.bias, module.running_mean):
                shift.normal_(std=0.1)
            for scale in (module.weight, module.running_var):
                scale.uniform_(0.5, 1.5)


class SumOverRanks(torch.autograd.Function):
    """A sum that every rank gets: each answers for the gradients of all."""

    @staticmethod
    def forward(context, value):
        return comm.all_sum(value)

    @staticmethod
    def backward(context, gradient):
        return comm.all_sum(gradient)


class SyncNorm(nn.SyncBatchNorm):
    """What torch's layer computes on GPUs: statistics of all ranks' pixels, however many each has.

    Ranks that have none take part, as torch's do.
    """

    def forward(self, x):
        if not self.training:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        pixels = x.transpose(0, 1).flatten(1)  # (C, pixels of this rank)
        count = x.new_full((1,), pixels.shape[1])
        mine = torch.cat([pixels.sum(1), pixels.square().sum(1), count])
        *both, count = SumOverRanks.apply(mine).split([len(pixels), len(pixels), 1])
        mean, square = (total / count for total in both)
        variance = square - mean.square()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


def synchronise(model):
    """Turn BatchNorm into what stands in for SyncBatchNorm, which torch has for GPUs only."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncNorm


def make_steps(strategy, *, data=DATA, seed=0, accumulate=ACCUMULATE, **augment):
    """Yield augmented steps of digits; `seed` changes augmentation, not the order."""
    table = compose(Recipe(canvas=SIDE, digits=(1, 4), heights=(14, 30)), "train", data["images"])
    table = without_boxes(table, data["bare"])
    samples = TrainSet(table, SIDE, AugmentConfig(**augment), seed=seed, epochs=EPOCHS)
    micro_batches = strategy.micro_batches(accumulate)
    plan = Plan(data["batch"], EPOCHS, 0, micro_batches, strategy.place.shard)
    return train_steps(samples, plan, 0)


def make_labelled_steps(strategy, *, data=DATA, seed=0, accumulate=ACCUMULATE, **augment):
    """Yield augmented steps of single digits."""
    table = single_digits("train", Choice(data["images"]))
    changes = ClassifyAugment(crop=1.0, **{"translate": 0.1, **augment})
    samples = LabelledTraining(table, SORTED, changes, seed=seed, epochs=EPOCHS)
    micro_batches = strategy.micro_batches(accumulate)
    plan = Plan(data["batch"], EPOCHS, 0, micro_batches, strategy.place.shard)
    return train_steps(samples, plan, 0)


def without_boxes(table, bare):
    """Return the table with the boxes of the rows `bare` taken away."""
    counts = np.diff(table.offsets)
    keep = ~np.isin(np.repeat(np.arange(len(counts)), counts), bare)
    counts[bare] = 0
    columns = ("boxes", "classes", "crowd", "difficult", "area")
    kept = {name: getattr(table, name)[keep] for name in columns}
    return replace(table, offsets=np.cumsum([0, *counts]), **kept)


def build(run_json, place, objects):
    """Make a learner and its steps, with the mistake that `mutant` names."""
    run = json.loads(run_json)
    learner = make_learner(place, run)
    mutant, last = run.get("mutant"), place.rank == place.world - 1
    if mutant:
        MUTANTS[mutant](learner)
    seed = 1 if mutant == "other augmentation" and last else 0
    data = DATA | run.get("data", {})
    changes = {"accumulate": run["accumulate"], **run.get("augment", {})}
    make = make_labelled_steps if run.get("task") else make_steps
    return learner, make(learner.strategy, data=data, seed=seed, **changes)


def here(kind, **keys):
    """Return this rank's place under a mode."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return Place(CPU, rank, world, share_of(MODES[kind](**keys), rank, world), is_main=rank == 0)


def traced(job_json):
    """Be one rank of a traced training; return all assignments made, of all ranks."""
    return run_traced(job_json, here(**json.loads(job_json)["run"]["strategy"]))


def run_traced(job_json, place):
    """Trace a training at `place`; return a row per image and head: step, id, head, checksum."""
    noting = []

    def build_noting(run_json, place, objects):
        learner, steps = build(run_json, place, objects)
        noting.append(learner)
        return learner, steps

    rows, made = [], []
    originals = DetectTask.loss, DetectTask._assign

    def assign(self, head, logits, candidates):
        matched = originals[1](self, head, logits, candidates)
        made.append((self.heads.index(head), torch.where(matched.score > 0, matched.target, -1)))
        return matched

    def loss(self, outputs, batch, progress):
        value = originals[0](self, outputs, batch, progress)
        rows.extend(
            [noting[0].step, int(i), head, zlib.crc32(c.numpy().tobytes())]
            for head, chosen in made
            for i, c, valid in zip(batch.ids, chosen, batch.valid, strict=True)
            if valid
        )
        made.clear()
        return value

    DetectTask.loss, DetectTask._assign = loss, assign
    try:
        assert trace(job_json, place, {}, build_noting) == 0
    finally:
        DetectTask.loss, DetectTask._assign = originals
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
    return sorted(noting[0].strategy.gather(table).tolist())


def entry(job_json, place, objects):
    """Be one started process of `Parity.measure`."""
    return trace(job_json, place, {}, build)


# -- mistakes that other trainers make ------------------------------------------------


class Rescaled:
    """A task whose loss is changed on the way out."""

    def __init__(self, task, change):
        self.task, self.change, self.views = task, change, task.views
        self.best, self.heads, self.terms, self.head_of = (
            task.best,
            task.heads,
            task.terms,
            task.head_of,
        )

    def loss(self, outputs, batch, progress):
        loss = self.task.loss(outputs, batch, progress)
        return self.change(loss)


def normalise_locally(learner):
    """Divide each cell's sums by its own count, then take the mean over cells."""

    def change(loss):
        own = {head: count.clamp(min=1) for head, count in loss.counts.items()}
        terms = {name: value / own[name.split("/")[0]] for name, value in loss.terms.items()}
        return Loss(terms, {head: torch.ones_like(count) for head, count in own.items()})

    learner.task = Rescaled(learner.task, change)


def multiply_by_world(learner):
    """Undo a mean over ranks that was never taken."""
    world = learner.strategy.place.world
    learner.task = Rescaled(
        learner.task,
        lambda loss: Loss({k: v * world for k, v in loss.terms.items()}, loss.counts),
    )


class ClipsLocally(ddp.DDP):
    """Clips each rank's own gradient, before the sum."""

    def grad_sync(self, *, enabled):
        return super().grad_sync(enabled=False)

    def divide(self, learner, loss):
        loss = super().divide(learner, loss)
        super().clip_grad_norm(learner.model, learner.clip)
        for parameter in learner.model.parameters():
            dist.all_reduce(parameter.grad)
        return loss

    def clip_grad_norm(self, model, max_norm):
        return super().clip_grad_norm(model, float("inf"))


def clip_locally(learner):
    """Clip by the norm of what this process holds."""
    strategy = learner.strategy
    if type(strategy) is ddp.DDP:
        strategy.__class__ = ClipsLocally
    else:
        strategy.sum_shards = lambda value: value


MUTANTS = {
    "local normaliser": normalise_locally,
    "loss times world": multiply_by_world,
    "other augmentation": lambda learner: None,  # in `build`
    "local clip": clip_locally,
}
