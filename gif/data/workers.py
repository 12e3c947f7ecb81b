"""The processes that read images for a command."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""What asks a command to stop: a terminal and a scheduler send it to all of its processes at once."""


def leave_signals_to_the_command(worker: int) -> None:
    """In a process that reads images: end when the command says so, which has its work to keep first.

    A worker that a signal ends is an error in the process that it reads for, in the midst of whatever that one saves.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
