import threading
import time

import pytest

from visiontrain.core.errors import StorageError
from visiontrain.engine.writer import Writer


def failing():
    raise StorageError("full")


def test_jobs_run_in_order_beside_what_started_them():
    writer, gate, done = Writer(background=True), threading.Event(), []
    writer.start("weights", lambda: (gate.wait(10), done.append(1)))
    writer.start("checkpoint", lambda: done.append(2))
    assert done == []
    gate.set()
    writer.wait("checkpoint")
    assert done == [1, 2]


def test_in_the_foreground_a_job_is_done_when_it_was_started():
    writer, done = Writer(background=False), []
    writer.start("weights", lambda: done.append(threading.current_thread()))
    assert done == [threading.main_thread()]


@pytest.mark.parametrize("background", [False, True])
def test_an_error_is_kept_until_somebody_hears_it_once(background):
    writer, done = Writer(background=background), []
    writer.start("weights", failing)
    writer.start("checkpoint", lambda: done.append(1))
    writer.rest()
    writer.wait("checkpoint")
    with pytest.raises(StorageError, match="full"):
        writer.wait("weights")
    writer.wait("weights")
    assert done == [1]


def test_threads_end_with_their_jobs():
    writer, done = Writer(background=True), []
    writer.start("weights", lambda: (time.sleep(0.05), done.append(1)))
    writer.rest()
    assert done == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("save")]
