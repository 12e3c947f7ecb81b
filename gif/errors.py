"""What the `gif` command reports in one line: whatever a user can mend, and nothing else."""

from __future__ import annotations

from gif_kernels.errors import InputError

__all__ = ["DivergedError", "InputError", "MissingFileError", "UnavailableError"]


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that a command needs is not there; the message says what to do."""


class UnavailableError(InputError, RuntimeError):
    """A package, hub or device that a command needs is not there; the message says how to do with or without it."""


class DivergedError(InputError, FloatingPointError):
    """Training came to numbers that are not finite; the message says which settings to look at."""
