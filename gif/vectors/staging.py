"""Rows of a table in a host's memory or in a file, read while the step before runs, and written while the next does."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from gif.devices import to_device
from gif.files import check_mapped
from gif.vectors.paging import read_at_random, read_soon


class Stage:
    """The rows that steps on ``device`` work on, of a ``table`` (m, d) on the CPU.

    One thread reads rows that are asked for (`stage`) and writes those that moved (`Staged.give_back`), in that order.
    Rows that a step moves after another step's were asked for are brought to it on the device, so a step works on the
    very rows that it would find if it had waited: the same bits, whether rows were asked for in time or not.

    Args:
        table: (m, d) on the CPU, which may be a memory map.
        device: where steps are.
        mapped: whether the table is a memory map: then its rows are read from a disk all at once.
    """

    def __init__(self, table: Tensor, device: torch.device, *, mapped: bool = False) -> None:
        self.device = device
        self._table = table
        self._mapped = mapped
        if mapped:
            read_at_random(table)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="code vectors")
        self._writes: list[Future[None]] = []
        self._waiting: weakref.WeakSet[Staged] = weakref.WeakSet()

    def stage(self, rows: Tensor) -> Staged:
        """Ask for ``rows`` (n,) int64 on the CPU, increasing and distinct."""
        staged = Staged(self, rows, self._thread.submit(self._read, rows))
        self._waiting.add(staged)
        return staged

    def settle(self) -> None:
        """Return when the table holds all rows that have moved; raise what reading or writing one has raised."""
        writes, self._writes = self._writes, []
        for write in writes:
            write.result()

    def _read(self, rows: Tensor) -> Tensor:
        check_mapped(self._table)
        if self._mapped:
            read_soon(self._table, rows)
        found = torch.empty(len(rows), self._table.shape[1], dtype=self._table.dtype, pin_memory=self._pins)
        return torch.index_select(self._table, 0, rows, out=found)

    def _write(self, rows: Tensor, moved: Tensor, ready: Callable[[], None]) -> None:
        ready()
        check_mapped(self._table)
        self._table[rows] = moved

    @property
    def _pins(self) -> bool:
        return self.device.type == "cuda"

    def _moved(self, by: Staged, rows: Tensor, moved: Tensor) -> None:
        self._waiting.discard(by)
        if len(rows) == 0:  # of a table that processes divide, where the others have all of a step's
            return
        for other in self._waiting:
            other.later.append((rows, moved))
        self._writes = [write for write in self._writes if not write.done() or write.exception()]
        host, ready = moved, _nothing
        if self._pins:
            host = torch.empty_like(moved, device="cpu", pin_memory=True).copy_(moved, non_blocking=True)
            ready = torch.cuda.current_stream(self.device).record_event().synchronize
        self._writes.append(self._thread.submit(self._write, rows, host, ready))

    def _taken(self, staged: Staged) -> None:
        self._waiting.discard(staged)


class Staged:
    """Rows (n, d) that a `Stage` was asked for. ``rows`` (n,): which, on the CPU."""

    def __init__(self, stage: Stage, rows: Tensor, reading: Future[Tensor]) -> None:
        self.rows = rows
        self.later: list[tuple[Tensor, Tensor]] = []
        self._stage, self._reading = stage, reading
        self._values: Tensor | None = None

    def wait(self) -> Tensor:
        """The rows as they were when they were read, on the CPU, once they have been."""
        return self._reading.result()

    def values(self) -> Tensor:
        """The rows as they are now, (n, d) on the stage's device; the same tensor whenever it is called again."""
        if self._values is None:
            self._stage._taken(self)
            values = self.wait().to(self._stage.device, non_blocking=True)
            for rows, moved in self.later:
                place = torch.searchsorted(rows, self.rows).clamp_max_(len(rows) - 1)
                own = (rows[place] == self.rows).nonzero()[:, 0]
                values[to_device(own, values.device)] = moved[to_device(place[own], values.device)]
            self.later.clear()
            self._values = values
        return self._values

    def give_back(self, moved: Tensor) -> None:
        """The rows as a step has left them, (n, d) on the stage's device: the table gets them soon."""
        self._stage._moved(self, self.rows, moved)


def _nothing() -> None:
    """There is nothing to wait for."""
