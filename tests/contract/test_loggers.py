"""Every entry of LOGGERS, on the real package: stays in the run folder, resumes, sends nothing."""

import json
import logging
import socket

import numpy as np
import pytest
from PIL import Image

from visiontrain.loggers.config import LogConfig
from visiontrain.loggers.registry import LOGGERS, build_loggers

ROW = {"epoch": 1, "step": 10, "samples": 160, "lr": 0.002, "train/o2m/box": 1.5, "val/map": 0.25}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Refuse every connection but those inside the machine, and every write in the tree."""

    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a logger went to {address}")
        return original(self, address)

    original = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", LOGGERS)
def test_lives_in_the_run_folder_and_resumes(name, tmp_path, offline):
    out = tmp_path / "run"
    out.mkdir()
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    state = None
    for epoch in (1, 2):
        logger = LOGGERS[name](LogConfig())
        assert logger.name == name
        if state is not None:
            logger.load_state(state)
        logger.start({"model": {"kind": "yolo_n"}, "epochs": 2}, out)
        logger.log({**ROW, "epoch": epoch}, epoch * 10)
        logger.image("plots/results", picture, epoch * 10)
        state = json.loads(json.dumps(logger.state()))
        logger.close(exit_code=0 if epoch == 2 else 75)
    written = [path.name for path in out.rglob("*") if path.is_file()]
    assert any(end in name for name in written for end in (".csv", "tfevents", ".wandb"))
    assert len({name for name in written if name.endswith(".wandb")}) <= 1  # one id
    assert {path.name for path in tmp_path.iterdir()} == {"run", "picture.png"}


def test_build_puts_csv_first_and_each_once():
    names = [logger.name for logger in build_loggers(LogConfig(to=["wandb", "console", "wandb"]))]
    assert names == ["csv", "wandb"]


def test_failure_switches_off_with_one_warning(tmp_path, caplog):
    blocked = tmp_path / "run"
    blocked.write_text("a file where the folder should be")
    csv, board = build_loggers(LogConfig(to=["tensorboard"]))
    with caplog.at_level(logging.WARNING):
        for logger in (csv, board):
            logger.start({}, blocked)
            logger.log(ROW, 10)
            logger.log(ROW, 20)
            logger.close()
    assert [record.args[0] for record in caplog.records] == ["csv", "tensorboard"]
