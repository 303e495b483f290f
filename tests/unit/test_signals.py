import os
import signal
import threading

import pytest

from visiontrain.engine.signals import Halt, Signals, halting, unsaved
from visiontrain.strategies import launch


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_a_signal_only_sets_a_flag(number, code):
    before = signal.getsignal(number)
    with Signals() as signals:
        assert signals.exit_code == 0
        os.kill(os.getpid(), number)
        assert signals.received == number
        assert signals.exit_code == code
    assert signal.getsignal(number) == before
    assert unsaved(number) == 128 + number


def test_a_second_interrupt_acts_at_once():
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.exit_code == 130


def test_terminating_twice_still_saves():
    with Signals() as signals:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code == 75


def test_another_thread_installs_nothing():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def enter():
        with Signals() as signals:
            inside.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert inside == [(0, before)]


def test_more_than_one_run_ends_at_once_and_hears_of_what_a_run_took():
    before = signal.getsignal(signal.SIGTERM)
    with halting() as heard:
        assert heard() == 0
        with Signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert (heard(), heard()) == (75, 75)
        with pytest.raises(Halt) as halt:
            os.kill(os.getpid(), signal.SIGINT)
        assert halt.value.exit_code == 130
    with halting() as heard:
        assert heard() == 0
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_what_nohup_ignores_ends_no_processes(monkeypatch):
    asked = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(launch.signal, "getsignal", lambda one: asked.get(one, signal.SIG_DFL))
    assert list(launch._handled()) == ["SIGQUIT"]
    asked.clear()
    assert list(launch._handled()) == ["SIGHUP", "SIGQUIT"]
