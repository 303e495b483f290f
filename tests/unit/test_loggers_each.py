"""What each logger promises beyond the contract."""

import csv
import importlib.util
import io
import json
import logging
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from visiontrain.core.errors import ConfigError
from visiontrain.loggers.config import LogConfig
from visiontrain.loggers.console import ConsoleProgress, PlainProgress, Silent, is_plain
from visiontrain.loggers.csv import CsvLogger
from visiontrain.loggers.guard import Guarded
from visiontrain.loggers.registry import build_progress
from visiontrain.loggers.tensorboard import TensorboardLogger
from visiontrain.loggers.wandb import WandbLogger, choose_mode


def row(epoch, **more):
    return {"epoch": epoch, "step": epoch * 10, "lr": 0.1 / 3, "train/box": 1.5, **more}


def read(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_drops_rows_past_the_checkpoint(tmp_path):
    first = CsvLogger()
    first.start({}, tmp_path)
    first.log(row(1), 10)
    saved = first.state()
    first.log(row(2, seconds=7.0), 20)  # killed after this row, before its checkpoint
    again = CsvLogger()
    again.load_state(saved)
    again.start({}, tmp_path)
    assert [r["epoch"] for r in read(tmp_path)] == ["1"]
    again.log(row(2, seconds=8.0), 20)
    again.log(row(3), 30)
    assert [r["step"] for r in read(tmp_path)] == ["10", "20", "30"]
    assert read(tmp_path)[1]["seconds"] == "8"


def test_csv_starts_anew_without_a_state(tmp_path):
    for _ in range(2):
        logger = CsvLogger()
        logger.start({}, tmp_path)
        logger.log(row(1), 10)
    assert len(read(tmp_path)) == 1


def test_csv_replaces_rows_after_a_roll_back(tmp_path):
    logger = CsvLogger()
    logger.start({}, tmp_path)
    for epoch, loss in ((1, 5.0), (2, 9.0), (3, 9.0), (2, 4.0)):
        logger.log(row(epoch, **{"train/box": loss}), epoch * 10)
    assert [(r["step"], r["train/box"]) for r in read(tmp_path)] == [("10", "5"), ("20", "4")]


def test_csv_orders_columns_and_takes_late_ones(tmp_path):
    logger = CsvLogger()
    logger.start({}, tmp_path)
    logger.log({"bytes_sent": 0, **row(1)}, 10)
    logger.log({**row(2), "val/map": 0.5, "odd": 1}, 20)
    assert list(read(tmp_path)[0]) == [
        *("epoch", "step", "lr", "train/box", "val/map", "odd", "bytes_sent")
    ]
    assert [r["val/map"] for r in read(tmp_path)] == ["", "0.5"]
    assert read(tmp_path)[0]["lr"] == "0.03333333"
    assert not list(tmp_path.glob("*.part"))


def test_rows_that_were_rolled_back_leave_the_file_at_once(tmp_path):
    logger = CsvLogger()
    logger.start({}, tmp_path)
    logger.log(row(1), 10)
    logger.log(row(2), 20)
    logger.load_state({"step": 10})
    assert [line["step"] for line in read(tmp_path)] == ["10"]


@pytest.mark.parametrize("again", ["at the next row", "at the end"])
def test_a_disk_that_was_full_for_a_while_costs_no_row(tmp_path, monkeypatch, caplog, again):
    logger = Guarded(CsvLogger())
    logger.start({}, tmp_path)
    logger.log(row(1), 10)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("os.fsync", full)
        logger.log(row(2), 20)
        logger.log(row(3), 30)
    assert [line["step"] for line in read(tmp_path)] == ["10"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'results.csv'}: No space left on device; written when that works again"
    ]
    if again == "at the next row":
        logger.log(row(4), 40)
        assert [line["step"] for line in read(tmp_path)] == ["10", "20", "30", "40"]
    else:
        logger.close()
        assert [line["step"] for line in read(tmp_path)] == ["10", "20", "30"]


def test_a_state_that_no_checkpoint_can_hold_switches_a_logger_off(tmp_path, caplog):
    class Odd(CsvLogger):
        def state(self):
            return {"path": tmp_path}

    logger = Guarded(Odd())
    with caplog.at_level(logging.WARNING):
        logger.start({}, tmp_path)
    assert "not JSON serializable; switched off, training goes on" in caplog.text
    assert json.dumps(logger.state()) == "{}"


def test_a_logger_that_failed_is_closed_once_all_the_same(tmp_path):
    class Tracker(CsvLogger):
        closed = 0

        def log(self, row, step):
            raise OSError("no network")

        def close(self, *, exit_code=0):
            self.closed += 1
            raise OSError("still none")

    tracker = Tracker()
    logger = Guarded(tracker)
    logger.start({}, tmp_path)
    logger.log(row(1), 10)
    logger.close()
    logger.close()
    assert tracker.closed == 1


def test_a_logger_that_could_not_start_gets_another_chance_on_resume(tmp_path):
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    first = Guarded(CsvLogger())
    first.start({}, blocked)
    first.log(row(1), 10)
    blocked.unlink()
    second = Guarded(CsvLogger())
    second.load_state(first.state())
    second.start({}, blocked)
    second.log(row(2), 20)
    assert [r["epoch"] for r in read(blocked)] == ["2"]


def test_tensorboard_hides_what_resume_repeats(tmp_path):
    states = []
    for value in (1.0, 2.0):
        logger = TensorboardLogger()
        if states:
            logger.load_state(states[0])
        logger.start({}, tmp_path)
        for step in (10, 20) if not states else (20, 30):
            logger.log({"val/map": value}, step)
            states.append(logger.state())
        logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/map")] == [(10, 1), (20, 2), (30, 2)]


def test_tensorboard_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'visiontrain\[tensorboard\]'"):
        TensorboardLogger()


def test_wandb_goes_online_only_with_a_key():
    assert choose_mode("auto", "", key=False) == "offline"
    assert choose_mode("auto", "online", key=False) == "offline"
    assert choose_mode("auto", "", key=True) == "online"
    assert choose_mode("auto", "offline", key=True) == "offline"
    assert choose_mode("auto", "disabled", key=True) == "disabled"
    assert choose_mode("offline", "online", key=True) == "offline"


class Recorder:
    """Stands for wandb's module and its run: keeps what it was told."""

    run = None  # no other run is open

    def __init__(self):
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings["id"], settings["mode"], settings["resume"]))
        return self

    def Settings(self, **settings):  # noqa: N802 - wandb's name
        return settings

    def define_metric(self, name, step_metric=None):
        self.calls.append(("define_metric", name, step_metric))

    def mark_preempting(self):
        self.calls.append(("mark_preempting",))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def test_wandb_keeps_its_id_and_tells_why_it_ended(tmp_path, monkeypatch):
    fake = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "not a key")
    first = WandbLogger(LogConfig())
    first.start({}, tmp_path)
    first.close(exit_code=75)
    second = WandbLogger(LogConfig())
    second.load_state(first.state())
    second.start({}, tmp_path)
    second.close()
    name = first.state()["id"]
    metrics = [("define_metric", "epoch", None), ("define_metric", "*", "epoch")]
    assert fake.calls == [
        ("init", name, "online", None),
        *metrics,
        ("mark_preempting",),
        ("finish", 75),
        ("init", name, "online", "allow"),
        *metrics,
        ("finish", 0),
    ]


def test_a_run_of_wandb_that_the_user_has_open_stays_theirs(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    theirs = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True))
    logger = WandbLogger(LogConfig())
    logger.start({}, tmp_path)
    logger.log(row(1), 10)
    logger.close()
    assert logger.state()["id"] != theirs.id
    theirs.log({"still": "open"})
    theirs.finish()


def watch(progress, clock):
    for epoch in (1, 2, 3):
        progress.start_epoch(epoch, 3, 4)
        for done in (2, 4):
            clock[0] += 10
            numbers = {"lr": 0.001, "images_per_s": 12.3, "data_wait": 0.25}
            progress.step(done, {"box": 1.234}, numbers)
        scores = {"val/map": 0.5} if epoch == 3 else {}
        progress.end_epoch({"epoch": epoch, "seconds": 20.0, "train/box": 1.0, **scores})
    progress.message("done: runs/detect/[train]")
    progress.close()
    progress.close()


def test_plain_lines_one_per_epoch():
    clock, text = [0.0], io.StringIO()
    console = Console(file=text)
    assert is_plain(console)
    watch(PlainProgress(console, lambda: clock[0]), clock)
    lines = text.getvalue().splitlines()
    assert [line.split() for line in lines] == [
        ["epoch", "loss", "time"],
        ["1/3", "1.0000", "0:20"],
        ["2/3", "1.0000", "0:20"],
        ["epoch", "loss", "mAP", "time"],  # of whole images: without mAP50
        ["3/3", "1.0000", "0.5000", "0:20"],
        ["done:", "runs/detect/[train]"],
    ]


def test_lines_of_a_classifier_show_its_score():
    text = io.StringIO()
    progress = PlainProgress(Console(file=text))
    progress.start_epoch(1, 1, 10)
    progress.end_epoch(row(1, **{"val/top1": 0.75, "val/top5": 1.0}))
    head, line = (line.split() for line in text.getvalue().splitlines())
    assert dict(zip(head, line, strict=True))["top-1"] == "0.7500"


def test_plain_lines_speak_every_half_minute_with_an_eta():
    clock, text = [0.0], io.StringIO()
    progress = PlainProgress(Console(file=text), lambda: clock[0])
    progress.start_epoch(1, 1, 100)
    for done in range(1, 11):
        clock[0] += 10
        progress.step(done, {"box": 2.0}, {"data_wait": 0.5})
    lines = text.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[-1] == "epoch 1/1 step 9/100  box 2.000  wait 50%  ETA 15:10"  # 10 s a step


def test_bars_on_a_terminal_show_the_numbers_and_leave_the_lines():
    clock, text = [0.0], io.StringIO()
    console = Console(file=text, force_terminal=True, width=60, _environ={"TERM": "xterm"})
    assert not is_plain(console)
    watch(ConsoleProgress(console, lambda: clock[0]), clock)
    shown = text.getvalue()
    for part in ("2/4", "box 1.234", "lr 1.00e-03", "img/s 12.3", "wait 25%", "ETA 0:30"):
        assert part in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # cursor hidden, shown again


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_bars_where_they_are_not_wanted(environment):
    assert is_plain(Console(force_terminal=True, _environ={"TERM": "xterm", **environment}))


def test_no_console_in_log_to_shows_nothing():
    assert isinstance(build_progress(LogConfig(to=[])), Silent)
