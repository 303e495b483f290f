"""Federated on several machines: keys, the door of the server, the relay, what is typed."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from contextlib import suppress
from multiprocessing import Pipe

import numpy as np
import pytest

import visiontrain as vt
from visiontrain import deployed
from visiontrain.core.config import build
from visiontrain.core.errors import ConfigError, RankError, Stopped
from visiontrain.federated_config import ClientConfig
from visiontrain.strategies.federated import keys, relay, superlink

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


def test_answers_that_nobody_waited_for_are_dropped():
    ours, theirs = Pipe()
    stop = [True]
    end = relay.Relayed(ours, ["x", "y", "z"], lambda: bool(stop))
    with pytest.raises(Stopped):
        end.ask({k: np.arange(3, dtype=np.uint8) for k in range(3)}, 7.5, 2)
    stop.clear()
    thread = threading.Thread(target=relay.carry, args=(Echo, theirs), daemon=True)
    thread.start()
    assert end.find(2, 0.0) == [0, 1]
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
        vt.train(
            data="digits",
            device="cpu",
            strategy={"kind": "federated", **mode},
            epochs=1,
            out=tmp_path / "run",
        )


FILES = {
    "server": ({"server": "fed.example.org"}, "server: 'fed.example.org'; write HOST:PORT"),
    "port": ({"server": "fed.example.org:90920"}, "write HOST:PORT"),
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


def test_a_client_says_that_nobody_answers_where_it_waits():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert deployed.out_of_reach("127.0.0.1", port) == ""
    assert deployed.out_of_reach("127.0.0.1", port) == "Connection refused"
