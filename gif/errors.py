"""What the `gif` command reports in one line: whatever a user can mend, and nothing else."""

from __future__ import annotations

from gif_kernels.errors import InputError

__all__ = ["InputError", "MissingFileError"]


class MissingFileError(InputError, FileNotFoundError):
    """A file or folder that a command needs is not there; the message says what to do."""
