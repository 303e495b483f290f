"""What the engine of parameter servers makes of processes that end; Ray itself is not started."""

import pytest
import torch
from ray.exceptions import ActorDiedError

from visiontrain.strategies import ray_start
from visiontrain.strategies.config import ParameterServer
from visiontrain.strategies.parameter_server import ray_engine
from visiontrain.strategies.parameter_server.engine import HubEnded, ServerEnded, WorkerEnded

FAULT = {"type": "DataError", "text": "no images"}


@pytest.fixture
def engine(monkeypatch):
    """Watch a process of each kind, whose task has ended as `ends` says."""
    engine = ray_engine.RayEngine(ParameterServer(), torch.device("cpu"), None)
    engine.ends = {}

    def get(ref):
        if isinstance(engine.ends[ref], Exception):
            raise engine.ends[ref]
        return engine.ends[ref]

    monkeypatch.setattr(ray_engine.ray, "get", get)
    monkeypatch.setattr(
        ray_engine.ray, "wait", lambda refs, **_: ([r for r in refs if r in engine.ends], [])
    )
    for ref, who in (("w", "worker 0"), ("s", 1), ("h", None)):
        engine._watch(ref, who)
    return engine


@pytest.mark.parametrize(
    ("ref", "end", "event"),
    [
        ("w", None, None),  # sent home, before the hub's answer to that came
        ("w", FAULT, WorkerEnded("worker 0", FAULT)),
        ("w", ActorDiedError(), WorkerEnded("worker 0", None)),
        ("s", FAULT, ServerEnded(1, FAULT)),
        ("s", ActorDiedError(), ServerEnded(1, None)),
        ("h", None, None),
        ("h", ActorDiedError(), HubEnded()),
    ],
)
def test_only_what_ended_before_its_time_is_a_fault(engine, ref, end, event):
    engine.ends[ref] = end
    assert engine.wait("call", 1.0) == event


def test_actors_that_were_told_to_end_are_no_failure(monkeypatch):
    seen = []
    monkeypatch.setattr(ray_start.worker, "print_to_stdstream", lambda data, **_: seen.append(data))
    ray_start.leave_out_endings()
    ray_start.leave_out_endings()  # a second Ray changes nothing
    told = {"pid": "raylet", "lines": ["Task failed: IntentionalSystemExit"]}
    ray_start.worker.print_to_stdstream(told, ignore_prefix=False)
    assert not seen
    ray_start.worker.print_to_stdstream({**told, "lines": [*told["lines"], "out of memory"]})
    assert [data["lines"] for data in seen] == [["out of memory"]]
