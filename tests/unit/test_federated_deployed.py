"""Clients on machines of their own, without Flower: what they agree to, who is waited for."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import clients
import cv2
import numpy as np
import pytest

import visiontrain as vt
from visiontrain import deployed
from visiontrain.core.config import build, from_keys
from visiontrain.core.errors import ConfigError, DataError, RankError, VisiontrainError
from visiontrain.federated_config import ClientConfig
from visiontrain.recipe import Run
from visiontrain.strategies import registry
from visiontrain.strategies.federated import messages, roster
from visiontrain.strategies.federated.config import Federated

RUN = {
    "data": "digits",
    "task": "classify",
    "model": {"kind": "resnet_tiny", "widths": [4, 8, 8], "norm": "group"},
    "imgsz": 32,
    "data.val_images": 16,
    "batch": 8,
    "workers": 0,
    "device": "cpu",
    "log": {"plots": False, "to": []},
}


class Elsewhere(clients.Calls):
    """Clients with settings and images of their own; they come when told to."""

    joins = True
    settings: list[ClientConfig]
    present = None
    calls = 0

    def clients(self, count, seconds):
        del count, seconds
        self.calls += 1
        return list(self.present(self.calls) if self.present else range(len(self.settings)))

    def _answer(self, client, message):
        try:
            return deployed.answer(self.settings[client], message, client)
        except VisiontrainError as error:
            return str(error)


def client(folder, name, **keys):
    folder = folder / name
    folder.mkdir(parents=True)
    data = {"source": "digits", "train_images": 24, "val_images": 8, "workers": 0}
    tree = {"server": "h:1", "device": "cpu", "out": str(folder), "data": data}
    return build(ClientConfig, tree | keys)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Return what trains with clients elsewhere, and the server's folder."""

    def train(settings, present=None, change=None, **keys):
        given = {"settings": settings, "present": present and staticmethod(present)}
        kind = type("Here", (Elsewhere,), given)
        monkeypatch.setitem(registry.DRIVERS, "federated", clients.server_of([], change, kind))
        mode = {"kind": "federated", "clients": len(settings), "rounds": 2, "serve": "127.0.0.1:1"}
        mode |= keys.pop("mode", {})
        return vt.train(**RUN | keys, strategy=mode, out=tmp_path / "server")

    return train


def test_clients_with_images_of_their_own_train_a_server_that_has_none(trained, tmp_path):
    three = [client(tmp_path, name) for name in "abc"]
    run = trained(three, mode={"algorithm": "scaffold"})
    assert run.metrics["samples"] == 2 * 3 * 24
    assert Path(run.config.strategy.keys).is_absolute()  # it may go on from another folder
    assert {c["rounds"] for c in run.metrics["clients"].values()} == {2}
    assert 0 <= run.metrics["worst_client"] <= 1
    for config in three:
        folder = tmp_path / config.out
        said = (folder / "client.log").read_text()
        assert "train, round 1: done" in said
        assert (folder / "over").exists()
        assert len(list(folder.glob("states/*/*.safetensors"))) == 2


def test_what_is_sent_says_nothing_of_places_and_holds_no_weights():
    run = Run.model_validate(
        {
            "data": {"source": "/secret/data.yaml"},
            "out": "/secret/out",
            "weights": "/secret/w",
            "strategy": {"kind": "federated", "serve": "0.0.0.0:1", "keys": "/secret/keys"},
        }
    )
    told = messages.run_for(run.model_dump_json())
    assert "secret" not in str(told)
    assert "0.0.0.0" not in str(told)
    assert told["optim"] == run.optim.model_dump(mode="json")


REFUSALS = {
    "models": ({"models": ["yolo_n"]}, "models: this client trains yolo_n, not resnet_tiny"),
    "rounds": ({"max_rounds": 1}, "max_rounds: this client trains 1, not 2"),
    "epochs": ({"max_epochs": 1}, "max_epochs: this client trains 1, not 2"),
    "clients": ({"min_clients": 4}, "min_clients: this client wants 4 results in a round, not 2"),
    "share": ({"share": ["backbone", "norm"]}, "share: this client keeps head"),
    "classes": ({"data": {"source": "ours"}}, "ours has the classes cat, dog, not those of"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_a_client_that_does_not_agree_trains_nothing(trained, tmp_path, monkeypatch, caplog, why):
    keys_of, said = REFUSALS[why]
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            folder = tmp_path / "ours" / split / name
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), np.full((32, 32, 3), 99, np.uint8))
    others = [client(tmp_path, name) for name in "ab"]
    run = trained([*others, client(tmp_path, "c", **keys_of)], mode={"min_fit": 2})
    assert "client 2: left out: " in caplog.text
    assert said in caplog.text
    assert run.metrics["clients"].keys() == {"0", "1"}
    assert not list((tmp_path / "c").glob("states/*"))
    assert said in (tmp_path / "c" / "client.log").read_text()


def test_parts_that_nobody_can_tell_apart_are_not_promised_to_stay(tmp_path):
    mode = {"strategy": {"kind": "federated", "local": ["norm"]}, "data": "digits"}
    run = from_keys(Run, {"model": "fcos", "augment": "none", **mode})
    config = client(tmp_path, "a", share=["backbone", "head", "norm"])
    with pytest.raises(ConfigError, match="share: this client keeps neck, which nobody can"):
        deployed.check_parts(config, run, 3)


def test_the_classifier_of_a_network_of_one_block_may_stay(tmp_path):
    keys = {"model": "timm", "model.backbone": "densenet121", "task": "classify", "data": "digits"}
    mode = {"kind": "federated", "local": ["head"]}
    run = from_keys(Run, {"augment": "none", **keys, "strategy": mode})
    deployed.check_parts(client(tmp_path, "a", share=["backbone", "neck", "norm"]), run, 3)


def test_clients_hear_that_a_run_is_over_which_had_no_round_left(trained, tmp_path):
    """As when its server died after the last round: it comes back, and trains nothing."""
    two = [client(tmp_path, name) for name in "ab"]
    trained(two)
    for config in two:
        (tmp_path / config.out / "over").unlink()
    run = trained(two, resume=True)
    assert run.metrics["steps"] == 2
    assert all((tmp_path / config.out / "over").exists() for config in two)


@pytest.mark.parametrize("number", [-1, 2, 3, "1"])
def test_a_round_that_the_run_does_not_have_is_not_trained(tmp_path, number):
    run = Run.model_validate({"data": {"source": "digits"}})
    mode = {"kind": "federated", "rounds": 2, "serve": "0.0.0.0:1"}
    run = run.model_copy(update={"strategy": build(Federated, mode)})
    spec = messages.run_for(run.model_dump_json())
    asked = {"kind": "train", "round": number, "run": spec}
    message = messages.write(messages.schema_of({}, (), ()), {}, {}, asked)
    with pytest.raises(DataError, match=f"federated: round {number} of 2"):
        deployed.client_of(client(tmp_path, "a"), message, 0)


def test_parts_that_stay_may_be_shared_by_nobody(trained, tmp_path):
    shares = {"share": ["backbone", "neck", "norm"]}
    run = trained([client(tmp_path, name, **shares) for name in "ab"], mode={"local": ["head"]})
    assert len(run.metrics["clients"]) == 2


def test_clients_may_come_later_and_go(trained, tmp_path, caplog):
    turns = {1: [0, 1], 2: [0, 1, 2], 3: [2, 0]}
    settings = [client(tmp_path, name) for name in "abc"]
    mode = {"rounds": 3, "min_fit": 2}
    run = trained(settings, lambda call: turns[min(call, 3)], mode=mode)
    rounds = [run.metrics["clients"][k]["rounds"] for k in "012"]
    assert rounds[0] == 3
    assert rounds[1] + rounds[2] >= 3
    assert (tmp_path / "c" / "over").exists()
    assert not (tmp_path / "b" / "over").exists()  # it had left


def test_who_waits_says_for_whom(trained, tmp_path, caplog):
    settings = [client(tmp_path, name) for name in "ab"]
    trained(settings, lambda call: [0] if call == 1 else [0, 1], mode={"min_fit": 2})
    said = [line for line in caplog.messages if line.startswith("clients that can train: ")]
    assert [line.partition(";")[0] for line in said] == [
        "clients that can train: 1 of 2 that a round takes"
    ]


def test_who_refused_and_left_is_not_waited_for(trained, tmp_path, monkeypatch):
    waits = []

    def clients_(self, count, seconds):
        waits.append((count, seconds))
        return range(3) if len(waits) == 1 else range(2)  # the third refuses, and leaves

    monkeypatch.setattr(Elsewhere, "clients", clients_)
    refusing = client(tmp_path, "c", models=["yolo_n"])
    settings = [*(client(tmp_path, name) for name in "ab"), refusing]
    trained(settings, mode={"min_fit": 2})
    assert [count for count, _ in waits[:2]] == [2, 3]
    assert max(seconds for _, seconds in waits) <= 10  # then it is seen that it has left


def test_who_is_slow_to_say_hello_is_sent_the_same_one_until_it_did(trained, tmp_path, monkeypatch):
    """Another one, of the next round, would make its answer to the first worthless."""
    hellos, real = [], Elsewhere.ask

    def ask(self, asked, seconds, enough):
        if 2 in asked and messages.read_meta(asked[2])["kind"] == "hello":
            hellos.append(asked[2].tobytes())
            if len(hellos) < 3:
                asked = {k: message for k, message in asked.items() if k != 2}
        return real(self, asked, seconds, enough)

    monkeypatch.setattr(Elsewhere, "ask", ask)
    settings = [client(tmp_path, name) for name in "abc"]
    run = trained(settings, mode={"min_fit": 2, "rounds": 4})
    assert len(hellos) == 3
    assert len(set(hellos)) == 1
    assert run.metrics["clients_late"] == 2  # it takes part, after those that are enough


def test_who_answers_nonsense_at_once_ends_no_round_that_others_make(trained, tmp_path, caplog):
    """Two answers are enough, and without a word the nonsense is always one of them."""

    def nonsense(number, answer):
        found = answer()
        return found[:-8] if number == 0 and len(found) > 2000 else found

    settings = [client(tmp_path, name) for name in "abc"]
    run = trained(settings, change=nonsense, mode={"min_fit": 2})
    assert [run.metrics["clients"][k]["rounds"] for k in "12"] == [2, 2]
    assert "round 1: 1 results of 3 clients, it takes 2; asking again" in caplog.text


def test_no_round_is_made_of_fewer_than_clients_were_told(trained, tmp_path):
    settings = [client(tmp_path, name) for name in "abc"]
    turns = {1: [0], 2: [1], 3: [0, 1]}
    with pytest.raises(RankError, match="fewer than 3 results"):
        trained(settings, lambda call: turns[min(call, 3)], mode={"timeout_s": 0.1})
    for name in "ab":  # nor is anything trained for it
        assert "train" not in (tmp_path / name / "client.log").read_text()


def test_who_refused_is_asked_again_for_it_may_be_mended(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(roster, "AGAIN_S", 0.0)
    refusing = client(tmp_path, "c", models=["yolo_n"])
    settings = [*(client(tmp_path, name) for name in "ab"), refusing]

    def mended(call):
        if call == 3:
            settings[2] = refusing.model_copy(update={"models": []})
        return range(3)

    trained(settings, mended, mode={"min_fit": 2, "rounds": 4})
    said = (tmp_path / "c" / "client.log").read_text()
    assert said.count("not done: models: this client trains yolo_n") == 2
    assert "hello, round 2: done" in said


def test_the_rate_that_is_logged_is_that_of_the_clients_rounds(trained, tmp_path):
    """Samples are no measure of it: clients have as many as they have."""
    keys = {"optim.lr": 0.1, "optim.lr_final": 0, "optim.schedule": "linear", "optim.warmup": 0}
    run = trained([client(tmp_path, name) for name in "ab"], mode={"rounds": 4}, **keys)
    with (run.folder / "results.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_precision_that_a_client_would_emulate_is_left_to_those_that_have_it(
    trained, tmp_path, monkeypatch
):
    seen, real = set(), deployed.Client
    monkeypatch.setattr(deployed, "slow", lambda kind, device: kind == "bf16")
    monkeypatch.setattr(
        deployed, "Client", lambda run, *rest: seen.add(run.precision) or real(run, *rest)
    )
    trained([client(tmp_path, "a")], precision="bf16")
    assert seen == {"fp32"}


def test_a_client_is_told_what_is_wrong_with_its_data(tmp_path, monkeypatch):
    for split in ("val", "train"):
        for name in ("cat", "dog"):
            folder = tmp_path / "ours" / split / name
            folder.mkdir(parents=True)
            cv2.imwrite(str(folder / "0.png"), np.full((32, 32, 3), 99, np.uint8))
    (folder / "1.png").write_bytes(b"none")
    said = []
    monkeypatch.setattr(deployed, "check_client_files", lambda *_: None)
    monkeypatch.setattr(deployed, "Joined", lambda *_: SimpleNamespace(run=lambda: 0))
    data = {"source": str(tmp_path / "ours"), "workers": 0}
    deployed.join_server(client(tmp_path, "a", data=data, server="127.0.0.1:1"), said.append)
    assert "train: 1 unknown-format" in said[0]


@pytest.mark.parametrize("keys", [{}, {"min_fit": 1}])
def test_a_server_starts_with_as_many_keys_as_a_round_takes(tmp_path, monkeypatch, keys):
    """One that is shut out is no reason to end."""

    class OpenError(Exception):
        pass

    def refuse(self):
        raise OpenError

    with warnings.catch_warnings():  # of what Flower imports
        warnings.simplefilter("ignore", DeprecationWarning)
        deployment = import_module("visiontrain.strategies.federated.deployment")
    monkeypatch.setattr(deployment, "check_folder", lambda _: None)
    monkeypatch.setattr(deployment, "registered", lambda _: [tmp_path / "a.pub"])
    monkeypatch.setattr(deployment.Deployment, "_refuse_taken", refuse)
    mode = {"kind": "federated", "clients": 2, "serve": "127.0.0.1:1"} | keys
    engine = deployment.Deployment(build(Federated, mode), tmp_path)
    said = OpenError if keys else ConfigError
    with pytest.raises(said, match=None if keys else "a round takes 2, but 1 are registered in"):
        engine.open(bool)
    engine.close()


@pytest.mark.parametrize("spec", [None, {}, {"out": "/"}, {"model": {"kind": "none"}}, [1], 3])
def test_a_run_that_is_none_is_refused_in_a_line(tmp_path, spec):
    with pytest.raises(ConfigError) as told:
        deployed.agreed(client(tmp_path, "a"), spec)
    assert "\n" not in str(told.value)


STUBBORN = """
import signal, sys, time
from visiontrain.strategies.federated.programs import end_after
signal.signal(signal.SIGINT, signal.SIG_IGN)
end_after(int(sys.argv[1]), grace_s=0.1)
print("on", flush=True)
time.sleep(60)
"""


def test_a_program_ends_with_the_one_it_works_for_whatever_it_makes_of_signals():
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    words = [sys.executable, "-c", STUBBORN, str(other.pid)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout.readline() == "on\n"
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(1.5)
        other.communicate(b"\n")
        assert program.wait(10) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"device": "0,1"}, "device: '0,1'; a client takes one"),
        (
            {"data": {"source": "digits", "cache": "ram"}},
            "data.cache: ram at a client, whose proce",
        ),
    ],
)
def test_what_does_nothing_at_a_client_is_refused(tmp_path, monkeypatch, keys, message):
    monkeypatch.setattr(deployed, "check_client_files", lambda *_: None)
    with pytest.raises(ConfigError, match=f"^{message}"):
        deployed.join_server(client(tmp_path, "a", **keys), print)
