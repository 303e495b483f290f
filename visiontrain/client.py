"""A client of a federated run: it trains on images of its own, and scores on them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from visiontrain.app import build_learner, plan_of, samples_of, score_set, scored_of
from visiontrain.core.durable import replace_file
from visiontrain.core.errors import DataError
from visiontrain.core.own import with_objects
from visiontrain.core.seed import derive
from visiontrain.core.types import Place
from visiontrain.data.loader import steps_per_epoch, train_steps
from visiontrain.data.open import open_dataset
from visiontrain.data.partition import Rows, part
from visiontrain.data.table import Table
from visiontrain.dealing import dealing_of, dealt
from visiontrain.engine.learner import Learner
from visiontrain.engine.optim import Schedule
from visiontrain.engine.step import train_step
from visiontrain.models.registry import build_model
from visiontrain.prepare import folder_of
from visiontrain.recipe import Run
from visiontrain.strategies.base import on_cpu
from visiontrain.strategies.comm import under
from visiontrain.strategies.devices import started_by
from visiontrain.strategies.federated.config import Federated
from visiontrain.strategies.federated.local import Local
from visiontrain.strategies.federated.messages import (
    CONTROL,
    WEIGHT,
    read,
    read_meta,
    schema_of,
    shared,
    write,
)
from visiontrain.strategies.precision import Precision
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import Bytes, number_of
from visiontrain.tasks.registry import as_task

MOVED = "moved/"  # of names in what is kept
# weight/NAME of parts that stay here; control/NAME of SCAFFOLD's variate, moved/NAME how it changed
State = dict[str, Tensor]


class Client:
    """Answers the server's messages; what it keeps between rounds lies in its folder."""

    def __init__(
        self, run: Run, number: int, tables: tuple[Table, Table], folder: Path, device: torch.device
    ) -> None:
        """Be a client.

        Args:
            run: what to train, as the server settled it.
            number: of the client.
            tables: what it trains on, what it scores on.
            folder: for what it keeps.
            device: to compute on.
        """
        assert isinstance(run.strategy, Federated)
        # Every client draws its own numbers; one that is alone draws those of one device.
        alone = run.strategy.clients == 1
        seed = run.seed if alone else derive(run.seed, "client", number) % 2**63
        self.run = run.model_copy(update={"ema": False, "seed": seed})
        self.config, self.number, self.folder = run.strategy, number, folder
        self.train_table, self.val_table = tables
        self.device = device

    def answer(self, message: Bytes) -> Bytes:
        """Do what a message asks for.

        Raises:
            RefusedError: it does not fit the model that the run describes.
            DataError: it asks for nothing that there is.
        """
        meta = read_meta(message)
        kind = {"hello": self._hello, "train": self._train, "score": self._score}
        if meta.get("kind") not in kind:
            raise DataError(f"federated: a message that asks for {meta.get('kind')!r}")
        return kind[meta["kind"]](message, meta)

    def _hello(self, message: Bytes, meta: Mapping[str, Any]) -> Bytes:
        del message
        found = self._state(meta) is not None
        return self._write((), {}, {}, {"has_state": found, "images": len(self.train_table)})

    def _train(self, message: Bytes, meta: Mapping[str, Any]) -> Bytes:
        """Train for the epochs of a round."""
        began, number, every = time.monotonic(), int(meta["round"]), self.config.local_epochs
        images = len(self.train_table)
        learner, strategy = self._learner()
        state = self._state(meta) or {}
        self._drop(meta, number)
        control = self._take(learner, message, state)
        names = tuple(control)
        mine = under(state, CONTROL) or {n: torch.zeros_like(control[n]) for n in names}
        start = {n: on_cpu(learner.live[n]) for n in names}
        strategy.begin(learner, {n: (control[n] - mine[n]).to(self.device) for n in names})
        per_epoch = steps_per_epoch(images, self.run.batch)
        first = number * every * per_epoch
        learner.step, learner.samples = first, number * every * images
        data = samples_of(self.run, self.train_table)
        plan = replace(plan_of(self.run, strategy), epochs=(number + 1) * every)
        for step in train_steps(data, plan, first):
            train_step(learner, step.micro_batches, step.images)
        new = mine
        if strategy.rates:
            ways = {n: (start[n] - on_cpu(learner.live[n])) / strategy.rates for n in names}
            new = {n: mine[n] - control[n] + ways[n] for n in names}
        parts = shared(learner.model, self.config.local)
        own = {WEIGHT + n: learner.live[n] for n in parts.own}
        moved = {n: new[n] - mine[n] for n in names}
        own |= {CONTROL + n: t for n, t in new.items()}
        self._keep(own | {MOVED + n: t for n, t in moved.items()}, number)
        found: dict[str, Any] = {
            "counts": dict(strategy.counts),
            "terms": dict(strategy.terms),
            "steps": strategy.plain_steps or 1.0,
            "images": every * images,
            "own_images": images,
        }
        if meta.get("score"):
            found["score"] = self._scored(learner)
        found["seconds"] = time.monotonic() - began
        return self._write(parts.up, learner.live, moved, found)

    def _score(self, message: Bytes, meta: Mapping[str, Any]) -> Bytes:
        """Score the server's weights on images of this client."""
        learner, _ = self._learner()
        self._take(learner, message, self._state(meta) or {})
        return self._write((), {}, {}, {"score": self._scored(learner)})

    def _scored(self, learner: Learner) -> float | None:
        if not len(self.val_table):
            return None
        metrics = score_set(self.run, learner, scored_of(self.run, self.val_table)).metrics
        return float(metrics[learner.task.best])

    # -- the model ----------------------------------------------------------------

    def _learner(self) -> tuple[Learner, Local]:
        run = self.run
        momentum = run.optim.momentum if run.optim.kind == "sgd" else 0.0
        prox = self.config.prox if self.config.algorithm == "fedprox" else 0.0
        place = Place(self.device, local_world=started_by(self.config) or 1)
        precision = Precision(run.precision, self.device)
        strategy = Local(
            place, precision, prox=prox, momentum=momentum, nesterov=run.optim.nesterov
        )
        count = len(self.train_table)
        schedule = Schedule(run.optim, run.epochs, count, min(run.batch, count))
        names = self.train_table.names
        model = build_model(run.model, len(names), run.task.kind)
        return build_learner(run, model, names, schedule, strategy), strategy

    @torch.no_grad()
    def _take(self, learner: Learner, message: Bytes, state: State) -> State:
        """Take the server's weights, and this client's own; return the server's variate."""
        ways = shared(learner.model, self.config.local)
        trained = {n for n, p in learner.model.named_parameters() if p.requires_grad}
        scaffold = self.config.algorithm == "scaffold"
        controlled = tuple(n for n in ways.up if n in trained) if scaffold else ()
        weights, control, _ = read(message, schema_of(learner.live, ways.all, controlled))
        own = under(state, WEIGHT)
        missing = learner.live.keys() - weights.keys() - own.keys()
        if missing:
            raise DataError(
                f"federated: client {self.number} lacks {min(missing)}, and the server did not "
                "send it; was its folder emptied?"
            )
        for name, tensor in (weights | own).items():
            learner.live[name].copy_(tensor)
        return control

    def _write(
        self, names: tuple[str, ...], live: Mapping[str, Tensor], controls: State, meta: Any
    ) -> Bytes:
        schema = schema_of(live, names, tuple(controls))
        return write(schema, {n: live[n] for n in names}, controls, meta)

    # -- what stays here ----------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def _state(self, meta: Mapping[str, Any]) -> State | None:
        """Return what was kept after the last round that the server has taken in.

        It may have gone back, or not have believed this client.

        Raises:
            DataError: it is not there any more.
        """
        taken = meta.get("taken", {}).get(str(self.number))
        keeps = self.config.algorithm == "scaffold" or bool(self.config.local)
        if taken is None or not keeps:
            return None
        path = self._path(int(taken))
        if not path.is_file():
            raise DataError(
                f"federated: client {self.number} lacks {path}, what it kept after round "
                f"{int(taken) + 1}; was its folder emptied?"
            )
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if self.number in meta.get("stale", ()):
            return {name: t for name, t in state.items() if name.startswith(WEIGHT)}
        # Of a variate that changed too much the server counted a share, and so does its owner.
        counted = number_of(meta.get("counted", {}).get(str(self.number), 1.0)) or 0.0
        for name, moved in under(state, MOVED).items():
            state[CONTROL + name] -= (1 - counted) * moved
        return state

    def _drop(self, meta: Mapping[str, Any], number: int) -> None:
        """Throw away what was kept in rounds before this one that the server did not take."""
        taken = meta.get("taken", {}).get(str(self.number))
        if taken is None:
            return
        for path in self.folder.glob("[0-9]*.safetensors"):
            if int(taken) < int(path.stem) < number:
                path.unlink(missing_ok=True)

    def _keep(self, state: Mapping[str, Tensor], number: int) -> None:
        """Keep what the next round needs, and what the server might go back to."""
        if not state:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        replace_file(self._path(number), save(tensors, {"client": json.dumps(self.number)}))
        known = {int(path.stem): path for path in self.folder.glob("[0-9]*.safetensors")}
        # Two checkpoints may be needed, and of each the newest round before it.
        least = number - 2 * self.run.save.every_epochs
        before = max((stem for stem in known if stem < least), default=least)
        for stem, path in known.items():
            if stem < before:
                path.unlink(missing_ok=True)


# -- clients of one machine -------------------------------------------------------------


def simulated(remote: Remote, number: int) -> Client:
    """Make a client that has a part of the run's own data."""
    run = with_objects(Run.model_validate_json(remote.run_json), remote.objects)
    if remote.run_json not in _OPEN:
        _OPEN.clear()
        _OPEN[remote.run_json] = _opened(run)
    dealing = dealing_of(run)
    train, val = (
        part(table, rows[number], dealing, number) for table, rows in _OPEN[remote.run_json]
    )
    folder = folder_of(run).clients / f"client-{number}"
    return Client(run, number, (train, val), folder, torch.device(remote.device))


Dealt = tuple[Table, Sequence[Rows]]  # a split, and which rows of it each client has
_OPEN: dict[str, tuple[Dealt, Dealt]] = {}  # by the run: data are opened once in each process


def _opened(run: Run) -> tuple[Dealt, Dealt]:
    spec = open_dataset(run.data, run.task.kind)
    train, val = (as_task(spec.table(split), run.task) for split in ("train", "val"))
    rows, others = dealt(run, train, val)
    return (train, rows), (val, others)
