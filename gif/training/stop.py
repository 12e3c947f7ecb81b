"""Ctrl-C and SIGTERM while training: noted, so that the step comes to its end and a checkpoint is written."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

from gif.data.workers import SIGNALS
from gif.distributed import gather_objects, rank, world_size
from gif.errors import Interrupted
from gif.progress import say

ECHO = 3.0  # seconds in which a signal may come again through a launcher


class StopRequest:
    """Within its block the first SIGINT or SIGTERM is noted as ``number``; one that comes later acts as it did outside.

    Later is after `ECHO` seconds: torchrun sends on what its processes have got from the terminal or a scheduler. Only
    the main thread gets signals: elsewhere, and for a signal that is ignored, nothing changes.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self.number and error is None:  # it came after the last look
            raise Interrupted("", self.number)

    def agreed(self, together: bool) -> int | None:
        """The signal that any process has got; of several processes None where they do not all look ``together``."""
        if world_size() == 1:
            return self.number
        return max(gather_objects(self.number or 0)) or None if together else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._since = number, now
            if rank() == 0:
                say(
                    f"stopping after this step, with a checkpoint; a signal after {ECHO:g} s stops at once, without one"
                )
        elif now - self._since > ECHO:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())
