"""Unfinished long work in a file, so that a killed run continues where it was."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gif.files import load_tensors, save_tensors

SECONDS = 60.0  # between two saves
LARGEST_SHARE = 0.1  # of the time that may go into saving


class UnfinishedWork:
    """The state of one piece of long work, kept in ``path``; None keeps nothing.

    Args:
        path: file of the state.
        format: the kind of work, with a version.
        settings: everything that decides the result; the state of a run with other settings is refused.
    """

    def __init__(self, path: str | Path | None, format: str, settings: str) -> None:
        self._path = None if path is None else Path(path)
        self._format = format
        self._settings = settings
        self._due = time.monotonic() + SECONDS

    def load(self) -> dict[str, Tensor] | None:
        """The tensors last saved; None where there are none.

        Raises ValueError if the file is damaged or another run's.
        """
        if self._path is None or not self._path.exists():
            return None
        tensors, metadata = load_tensors(self._path, format=self._format)
        if metadata["settings"] != self._settings:
            raise ValueError(
                f"{self._path} is the checkpoint of another run ({metadata['settings']}; this one is "
                f"{self._settings}); remove it, or name another file"
            )
        return tensors

    @property
    def due(self) -> bool:
        """Whether it is time to save again: once a minute, and more rarely where saving takes long."""
        return self._path is not None and time.monotonic() >= self._due

    def save(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the state, atomically."""
        if self._path is None:
            return
        begin = time.monotonic()
        save_tensors(self._path, tensors, format=self._format, settings=self._settings)
        end = time.monotonic()
        self._due = end + max(SECONDS, (end - begin) / LARGEST_SHARE)

    def remove(self) -> None:
        """Forget the state: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
