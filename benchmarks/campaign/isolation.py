"""Cases in a process of their own, which may crash, hang or eat memory without taking the campaign with it."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import psutil
import torch

from benchmarks.campaign.records import Found, Kind

LIMIT = 180.0
"""Seconds that one case may take."""
MEMORY = 2 << 30
"""Bytes that a case may take beside what the process has: inputs are a few kilobytes."""
_FORK = get_context("fork")  # a process that has torch at once


class Isolated:
    """A process that tries one case after another; a new one where it ends."""

    def __init__(self, kinds: dict[str, Kind], limit: float = LIMIT) -> None:
        self._kinds, self._limit = kinds, limit
        self._process, self._pipe = self._start()

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def attempt(self, case: str) -> Found:
        """Try ``case``, seed/part/kind/number."""
        self._pipe.send(case)
        try:
            if self._pipe.poll(self._limit):
                found: Found = self._pipe.recv()
                return found
            why = f"it did not end in {self._limit:.0f} s"
        except EOFError:
            self._process.join()
            why = f"the process ended with code {self._process.exitcode}"
        self._end()
        self._process, self._pipe = self._start()
        return Found("traceback", why)

    def _start(self):  # type: ignore[no-untyped-def]  # of a context
        ours, theirs = _FORK.Pipe()
        process = _FORK.Process(target=_serve, args=(self._kinds, theirs, ours))
        process.start()
        theirs.close()
        return process, ours

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
        self._process.kill()  # which may not have come to lead a group yet
        self._process.join()
        self._pipe.close()


def _serve(kinds: dict[str, Kind], pipe: Connection, others: Connection) -> None:
    others.close()
    os.setsid()
    torch.set_num_threads(1)
    largest = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (largest, largest))
    with suppress(EOFError):
        while True:
            pipe.send(attempt(kinds, pipe.recv()))


def attempt(kinds: dict[str, Kind], case: str) -> Found:
    """Try ``case`` in this process."""
    _, part, name, number = case.split("/")
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        (scratch := Path(folder) / "case").mkdir()
        return kinds[f"{part}/{name}"].attempt(int(number), Random(case), scratch)
