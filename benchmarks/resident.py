"""Memory that a process holds, whoever allocated it."""

from __future__ import annotations

import ctypes
import gc
import threading

import psutil

SAMPLING_SECONDS = 0.02


class ResidentMemory:
    """The most resident memory inside the block, beyond what there was: libraries allocate on their own.

    Pages of mapped files, which the system may drop at any time, do not count.
    """

    def __enter__(self) -> ResidentMemory:
        give_back()
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._most = self._held()
        self._watch = threading.Thread(target=self._sample)
        self._watch.start()
        return self

    def _held(self) -> int:
        memory = self._process.memory_info()
        return int(memory.rss - memory.shared)

    def _sample(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self._most = max(self._most, self._held())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watch.join()

    @property
    def peak(self) -> int:
        """The most bytes that were held beyond those there were."""
        return self._most - self._before


def give_back() -> None:
    """Return memory that was freed to the system, where the C library can (glibc): else it would hide what comes."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
