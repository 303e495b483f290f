"""Every error a user can meet, and the exit code each one ends the program with.

VisiontrainError
├── ConfigError        2   a key, a type or a value that cannot be used
├── DataError          3   data that cannot be read or trained on
├── FetchError         3   a file that a URL, or the system for the time being, does not give
├── CheckpointError    2   a checkpoint or weights file that cannot be used
├── OutOfMemoryError   4   memory ran out
├── DivergedError      5   the loss stayed non-finite after roll-backs
├── RankError          1   a process of the run failed
└── StorageError      74   the run's folder cannot be written, as when the disk is full
"""

from __future__ import annotations


class VisiontrainError(Exception):
    """An error to show as one line: `<where>: <what it got>; <what would do>`."""

    exit_code = 1


class ConfigError(VisiontrainError, ValueError):
    """A configuration that cannot be used."""

    exit_code = 2


class DataError(VisiontrainError, ValueError):
    """Data that cannot be read or trained on."""

    exit_code = 3


class FetchError(VisiontrainError):
    """A file that cannot be had; no DataError, since nothing takes its place."""

    exit_code = 3


class CheckpointError(VisiontrainError):
    """A checkpoint or weights file that cannot be used."""

    exit_code = 2


class OutOfMemoryError(VisiontrainError):
    """Memory ran out."""

    exit_code = 4


class DivergedError(VisiontrainError):
    """Training stayed non-finite after rolling back."""

    exit_code = 5


class RankError(VisiontrainError):
    """A process of the run failed; the message names its rank."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        """Say what failed.

        Args:
            message: for the user.
            lasting: whether it would fail again: by a mistake in code, not by a machine.
        """
        super().__init__(message)
        self.lasting = lasting


class StorageError(VisiontrainError):
    """The run's folder cannot be written; what was written before is intact."""

    exit_code = 74  # sysexits.h: EX_IOERR, the neighbour of 75


class Stopped(Exception):  # noqa: N818 - no error
    """An evaluation or a round ended early since it was asked to; nothing is changed by it."""
