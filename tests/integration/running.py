"""Runs as they are typed, in tests that look at their processes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path


class Started:
    """A run as it is typed; what it says goes into a file."""

    def __init__(self, said, *words, verb="train"):
        self.said = said
        command = [sys.executable, "-m", "visiontrain", verb, *words]
        with said.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self.pid = self.process.pid

    def end(self, seconds=250):
        """Wait for its end; return its exit code and what it said."""
        return self.process.wait(seconds), self.said.read_text()


def parents():
    """Return the parent and the command line of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        found[int(folder.name)] = (int(stat.rpartition(")")[2].split()[1]), line)
    return found


def children(process, kind):
    """Return the processes of a kind that a run has started."""
    every = parents()

    def is_ours(pid):
        while pid in every:
            if pid == process.pid:
                return True
            pid = every[pid][0]
        return False

    return [pid for pid, (_, line) in every.items() if kind in line and is_ours(pid)]


def wait_for(what, process, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.process.poll() is None, process.said.read_text()
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it did not come")


def epochs(out):
    path = out / "results.csv"
    return path.read_text().count("\n") - 1 if path.exists() else 0
