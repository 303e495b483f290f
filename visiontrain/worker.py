"""Where every process of every mode starts: a run as JSON, and this process's place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from visiontrain import app, deployed, elsewhere
from visiontrain.client import simulated
from visiontrain.core.durable import FULL, full_disk
from visiontrain.core.errors import OutOfMemoryError, StorageError
from visiontrain.core.memory import forget_peak, kept_memory
from visiontrain.core.own import NONE, Objects, with_objects
from visiontrain.core.types import Place
from visiontrain.elsewhere import build_shard, run_of
from visiontrain.engine.parity import trace
from visiontrain.prediction import from_text, predict_share
from visiontrain.prepare import folder_of
from visiontrain.recipe import Run
from visiontrain.strategies.parameter_server.shard import Shard
from visiontrain.strategies.parameter_server.talk import Link
from visiontrain.strategies.remote import Remote
from visiontrain.strategies.tensor_message import Bytes

CPU_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # in RuntimeErrors
GPU_MEMORY = ("status_alloc_failed",)  # of libraries beside torch's allocator


def main(run_json: str, place: Place, objects: Objects = NONE) -> int:
    """Train; return the exit code.

    Raises:
        VisiontrainError: with one line for the user.
        KeyboardInterrupt: at a second Ctrl-C: at once, without saving.
    """
    forget_peak()
    run = with_objects(Run.model_validate_json(run_json), objects)
    with explained(run, _less_memory(run)), kept_memory():
        return app.fit(run, place)


def validate(run_json: str, place: Place, objects: Objects = NONE) -> int:
    """Score a run's weights; return the exit code.

    Raises:
        VisiontrainError: with one line for the user.
    """
    forget_peak()
    run = with_objects(Run.model_validate_json(run_json), objects)
    with explained(run, f"set batch={max(1, run.batch // 2)}, or a smaller imgsz"), kept_memory():
        return app.score(run, place)


def predict(config_json: str, place: Place, objects: Objects = NONE) -> int:
    """Find objects in this process's share of the pictures; return the exit code.

    Raises:
        VisiontrainError: with one line for the user.
    """
    config = from_text(config_json)
    less = f"set batch={config.batch // 2}" if config.batch > 1 else "take a smaller imgsz or tile"
    with fitting(f"{config.batch} images", less):
        return predict_share(config, place, objects)


def traced(job_json: str, place: Place, objects: Objects = NONE) -> int:
    """Be one process of a training that `visiontrain parity` traces; return the exit code."""
    return trace(job_json, place, objects, app.build_traced)


def serve(remote: Remote, number: int) -> Shard:
    """Make what a parameter server holds."""
    return build_shard(remote, number)


def compute(remote: Remote, name: str, link: Link) -> None:
    """Be a worker of a run with parameter servers.

    Raises:
        VisiontrainError: with one line for the user.
    """
    run, _ = run_of(remote)
    with fitting(f"{run.batch} images of {run.imgsz} pixels", _less_memory(run)), kept_memory():
        elsewhere.compute(remote, name, link)


def answer(remote: Remote, number: int, message: Bytes) -> Bytes:
    """Answer a message as a client of a federated run that is simulated here.

    Raises:
        VisiontrainError: with one line for the user.
    """
    client = simulated(remote, number)
    run = client.run
    with fitting(f"{run.batch} images of {run.imgsz} pixels", _less_memory(run)), kept_memory():
        return client.answer(message)


def joined() -> Callable[[Bytes, int], Bytes]:
    """Return what answers messages in a process that Flower starts at a client for one of them."""
    config = deployed.read_config()
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    def answer(message: Bytes, number: int) -> Bytes:
        with fitting("the server's batch", "ask for a smaller one"), kept_memory():
            return deployed.answer(config, message, number)

    return answer


def weighed(job_json: str, place: Place, objects: Objects = NONE) -> int:
    """Be one process of a training that `visiontrain plan measure=true` weighs."""
    from visiontrain.planning import weigh  # noqa: PLC0415 - DTensor: no other entry waits for it

    with kept_memory():
        return weigh(job_json, place, objects)


@contextmanager
def explained(run: Run, less: str) -> Iterator[None]:
    """Turn memory and disk running out into errors; `less` says what needs less memory."""
    try:
        with fitting(f"{run.batch} images of {run.imgsz} pixels", less):
            yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise StorageError(full_disk(folder_of(run).path, str(error))) from error


@contextmanager
def fitting(what: str, less: str) -> Iterator[None]:
    """Turn memory running out over `what` into an error; `less` says what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        sure = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not sure and not any(text in str(error).lower() for text in (*CPU_MEMORY, *GPU_MEMORY)):
            raise
        raise OutOfMemoryError(f"batch: {what} do not fit in memory; {less}") from error


def _less_memory(run: Run) -> str:
    """Say what trains in less memory: smaller micro-batches while a batch can be cut further."""
    if 2 * run.accumulate <= run.batch:
        return f"set accumulate={2 * run.accumulate} (same batch, in parts), or a smaller imgsz"
    return "set a smaller imgsz or model"
