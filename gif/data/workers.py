"""The processes that read images for a command."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.utils.data import DataLoader

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a command to stop: a terminal and a scheduler send it to all of its processes at once."""


def leave_signals_to_the_command(worker: int) -> None:
    """In a process that reads images: end when the command says so, which has its work to keep first.

    A worker that a signal ends is an error in the process that it reads for, in the midst of whatever that one saves.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches_of(loader: DataLoader[T]) -> Iterator[T]:
    """The batches of a loader whose workers are there, and leave signals to the command from their first moment.

    A signal that comes while they start waits: a worker that has not yet come to `leave_signals_to_the_command` would
    be ended by it.
    """
    with _signals_wait():
        return iter(loader)


@contextmanager
def _signals_wait() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # on Windows nothing is sent to all
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # which a process inherits that starts here
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
