"""Programs of Flower's that we start, or that it finds in the place of its own (imports none)."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

OTHERS = ("flwr-agentapp", "flwr-connector", "flwr-model", "flwr-serverapp", "flwr-simulation")
PARENT = "VISIONTRAIN_PARENT"  # in the environment: who started a program
LOOK_S, GRACE_S = 1.0, 20.0


def end_with_parent() -> None:
    """End this program when the one that started it has ended, however that was.

    Its number is in the environment: it may have ended before this one looks.
    """
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def end_after(process: int, grace_s: float = GRACE_S) -> None:
    """End this program at the latest `grace_s` after another one, whatever it is at.

    Flower sends its programs one SIGINT when the one they work for is gone. That is lost where a
    shell started all in the background, or where training takes it for a wish to stop: then the
    answer is offered for ever to a server that is no more.
    """

    def watch() -> None:
        while exists(process):
            time.sleep(LOOK_S)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="process", daemon=True).start()


def exists(process: int) -> bool:
    """Tell whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def put_client_program(folder: Path, code: str) -> None:
    """Write a `flwr-clientapp` into a folder that stands first in the PATH of what Flower starts.

    Flower's other programs that run what a server sends are put out of reach there too.

    Args:
        folder: it.
        code: Python that runs it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusing = "raise SystemExit('not run at a client of visiontrain')"
    for name, text in {"flwr-clientapp": code, **dict.fromkeys(OTHERS, refusing)}.items():
        path = folder / name
        path.write_text(f"#!{sys.executable}\n{text}\n")
        path.chmod(0o700)
