"""What the `gif` command reports in one line: whatever a user can mend, and nothing else."""

from __future__ import annotations

import signal
from textwrap import shorten

from gif_kernels.errors import InputError

__all__ = [
    "DamagedFileError",
    "DivergedError",
    "InputError",
    "Interrupted",
    "MissingFileError",
    "OutputError",
    "UnavailableError",
    "in_short",
]

_CHARACTERS = 300


def in_short(error: BaseException) -> str:
    """What a library says of an error, in one line, cut short: it may list every weight, or a whole graph."""
    return shorten(str(error), _CHARACTERS)


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that a command needs is not there; the message says what to do."""


class DamagedFileError(InputError):
    """A file does not hold what was written to it; the message names it."""


class OutputError(InputError, OSError):
    """A place cannot be written: the disk is full, it is a folder, it is read-only; the message says which and why."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM (``number``). The message says what is kept; it is empty where that is not known yet."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.number = number


class UnavailableError(InputError, RuntimeError):
    """A package, hub or device that a command needs is not there; the message says how to do with or without it."""


class DivergedError(InputError, FloatingPointError):
    """Training came to numbers that are not finite; the message says which settings to look at."""
