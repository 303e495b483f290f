"""Clients on machines of their own, without Flower: what they agree to, keys, door and relay."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from contextlib import suppress
from multiprocessing import Pipe

import clients
import cv2
import numpy as np
import pytest

import visiontrain as vt
from visiontrain import deployed
from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError, DataError, RankError, Stopped, VisiontrainError
from visiontrain.federated_config import ClientConfig
from visiontrain.recipe import Run
from visiontrain.strategies import registry
from visiontrain.strategies.federated import keys, messages, relay, superlink
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


@pytest.mark.parametrize("spec", [None, {}, {"out": "/"}, {"model": {"kind": "none"}}, [1], 3])
def test_a_run_that_is_none_is_refused_in_a_line(tmp_path, spec):
    with pytest.raises(ConfigError) as told:
        deployed.agreed(client(tmp_path, "a"), spec)
    assert "\n" not in str(told.value)


# -- keys ---------------------------------------------------------------------------


def test_a_server_is_believed_by_its_own_certificate_and_no_other(tmp_path):
    for name in ("one", "two"):
        made = keys.make_certificates(tmp_path / name, ["server.example"])
        assert made == ["server.example", "localhost", "127.0.0.1"]
    one = tmp_path / "one"
    assert stat.S_IMODE((one / "server.key").stat().st_mode) == 0o600
    assert shaken(one, one, "server.example") == "TLSv1.3"
    assert shaken(one, one, "127.0.0.1") == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(one, tmp_path / "two", "server.example")
    with pytest.raises(ssl.SSLCertVerificationError):
        shaken(one, one, "other.example")
    with pytest.raises(ConfigError, match="is there"):
        keys.make_certificates(one, [])


def shaken(server, client, name):
    """Shake hands in memory; return the protocol."""
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(server / keys.CERTIFICATE, server / keys.KEY)
    ours = ssl.create_default_context(cafile=client / keys.CA)
    ours.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 does
    a, b, c, d = (ssl.MemoryBIO() for _ in range(4))
    here = ours.wrap_bio(a, b, server_hostname=name)
    there = theirs.wrap_bio(c, d, server_side=True)
    for _ in range(5):
        for side, out, into in ((here, b, c), (there, d, a)):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
            into.write(out.read())
    return here.version()


def test_clients_are_registered_once_by_what_they_may_show(tmp_path):
    folder = tmp_path / "keys"
    with pytest.raises(ConfigError, match=r"ca\.crt is missing; make it"):
        keys.register(tmp_path / "a.key.pub", folder)
    keys.make_certificates(folder, [])
    public = keys.make_key(tmp_path / "a.key")
    assert public.name == "a.key.pub"
    assert stat.S_IMODE((tmp_path / "a.key").stat().st_mode) == 0o600
    assert keys.register(public, folder).name == "a.pub"
    again = tmp_path / "b.pub"
    again.write_text(public.read_text())
    with pytest.raises(ConfigError, match="registered already, as a"):
        keys.register(again, folder)
    with pytest.raises(ConfigError, match="no public key"):
        keys.register(tmp_path / "a.key", folder)  # the secret one is not taken
    other = keys.make_key(tmp_path / "x" / "a.key")
    with pytest.raises(ConfigError, match="another client is called a"):
        keys.register(other, folder)
    with pytest.raises(ConfigError, match="a client keeps its key"):
        keys.make_key(tmp_path / "a.key")
    assert [path.name for path in keys.registered(folder)] == ["a.pub"]


# -- the door -----------------------------------------------------------------------


def test_the_door_lets_only_clients_calls_in_from_elsewhere(tmp_path, monkeypatch):
    ready = tmp_path / "ready"
    monkeypatch.setenv(superlink.READY, str(ready))
    listening = socket.create_server(("127.0.0.1", 0))
    with listening, socket.create_connection(listening.getsockname()) as ours:
        here, there = ours.getsockname(), listening.getsockname()

        def refused(path, host=here):
            scope = {"path": path, "client": host, "server": there}
            return superlink.refusal(scope)

        assert refused("/v1/fleet/pull-messages", ("10.0.0.9", 5)) == 503
        ready.touch()
        assert refused("/v1/fleet/pull-messages", ("10.0.0.9", 5)) is None
        for path in ("/v1/control/start-run", "/v1/runtime/x", "/docs", "/v1/fleetX", "/health"):
            assert refused(path, ("10.0.0.9", 5)) == 403
            assert refused(path, None) == 403
            assert refused(path) is None
        assert superlink.user_of(here, there) == os.getuid()
        assert superlink.user_of(here, ("127.0.0.1", 1)) == -1
        assert superlink.user_of(there, ("0.0.0.0", 0)) == -1  # not of a call
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        assert refused("/v1/control/start-run") == 403  # of another user of this machine
    assert superlink.user_of(here, there) == -1


def test_addresses_are_written_as_the_kernel_writes_them():
    assert superlink.named(bytes([127, 0, 0, 1]), 80) == "0100007F:0050"
    assert superlink.named(bytes(15) + b"\1", 443) == "0" * 24 + "01000000:01BB"


# -- the relay ----------------------------------------------------------------------


class Echo:
    """Clients that send back what they get; one says no."""

    def __init__(self, names):
        self.names = names

    def find(self, count, seconds):
        return list(range(len(self.names)))[: int(count + seconds)]

    def ask(self, asked, seconds, enough):
        assert (seconds, enough) == (7.5, 2)
        return {k: "no" if k == 1 else message[::-1].copy() for k, message in asked.items()}


def test_what_is_asked_and_answered_passes_the_relay_unchanged():
    ours, theirs = Pipe()
    thread = threading.Thread(target=relay.carry, args=(Echo, theirs))
    thread.start()
    end = relay.Relayed(ours, ["x", "y", "z"], lambda: False)
    assert end.find(2, 0.0) == [0, 1]
    asked = {k: np.arange(3 + k, dtype=np.uint8) for k in range(3)}
    found = end.ask(asked, 7.5, 2)
    assert found.pop(1) == "no"
    assert {k: list(v) for k, v in found.items()} == {0: [2, 1, 0], 2: [4, 3, 2, 1, 0]}
    end.end()
    thread.join(5)
    assert not thread.is_alive()


def test_a_server_process_that_ends_is_named():
    ours, theirs = Pipe()
    stop = []
    end = relay.Relayed(ours, [], lambda: bool(stop))
    stop.append(True)
    with pytest.raises(Stopped):
        end.find(1, 1e9)
    theirs.close()
    with pytest.raises(RankError, match="server process ended"):
        end.find(1, 1.0)
    end.end()
    ours.close()


# -- what is typed ------------------------------------------------------------------

WRONG = {
    "serve": ({"serve": "9092"}, "write HOST:PORT"),
    "host": ({"serve": "192.168.1.5:9092"}, "take 0.0.0.0 or 127.0.0.1"),
    "keys": ({"keys": "k"}, "add strategy.serve"),
    "threads": ({"serve": "0.0.0.0:1", "threads": 2}, "machines of their own"),
    "partition": (
        {"serve": "0.0.0.0:1", "partition": "dirichlet"},
        "images and machines of their own",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_keys_that_do_nothing_are_refused(tmp_path, what):
    mode, said = WRONG[what]
    with pytest.raises(ConfigError, match=said):
        vt.train(**RUN, strategy={"kind": "federated", **mode}, epochs=1, out=tmp_path / "run")


FILES = {
    "server": ({"server": "fed.example.org"}, "server: 'fed.example.org'; write HOST:PORT"),
    "ca": ({"ca": "a.key"}, "ca: a.key is something else"),
    "public": ({"key": "a.key.pub"}, "key: a.key.pub is something else; give the file without"),
    "none": ({"key": "b.key"}, "key: no file b.key; make it with"),
}


@pytest.mark.parametrize("what", FILES)
def test_files_of_a_client_are_looked_at_before_it_waits(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    keys.make_certificates(tmp_path / "keys", [])
    keys.make_key(tmp_path / "a.key")
    given, said = FILES[what]
    tree = {"server": "h:1", "ca": "keys/ca.crt", "key": "a.key"} | given
    with pytest.raises(ConfigError, match=said):
        deployed.join_server(build(ClientConfig, tree), print)


def test_a_round_that_there_is_not_is_not_trained(tmp_path):
    config = client(tmp_path, "a")
    mode = {"kind": "federated", "serve": "0.0.0.0:1", "rounds": 2}
    run = Run.model_validate({"data": {"source": "digits"}, "strategy": mode})
    told = {"kind": "train", "round": 3, "run": messages.run_for(run.model_dump_json())}
    message = messages.write(messages.schema_of({}, (), ()), {}, {}, told)
    with pytest.raises(DataError, match="round 3 of 2"):
        deployed.answer(config, message, 0)
