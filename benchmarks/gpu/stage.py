"""`python -m benchmarks.gpu.stage NAME ...`: one stage, or parts of it, in this process. Started by the command."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.gpu.device import REPLAYS, Call, Device, NoDevice, find_device
from benchmarks.gpu.plan import NO_DEVICE, TO_STOP
from benchmarks.gpu.records import FILE, Recorder, Status, environment

T = TypeVar("T")
SEED = 0
BITS = "the same bits twice"


@dataclass
class Run:
    """What a stage works with: the device, the time, and where to write what it finds."""

    device: Device
    record: Recorder
    folder: Path
    deadline: float

    @property
    def rehearsal(self) -> bool:
        """Whether this is one."""
        return self.record.environment.rehearsal

    def pick(self, full: T, tiny: T) -> T:
        """The sizes of a measurement, or of a rehearsal."""
        return tiny if self.rehearsal else full

    @property
    def seconds_left(self) -> float:
        """Until the stage is to begin nothing new."""
        return self.deadline - time.monotonic()

    def points(self, found: Iterable[T], takes: float = 0.0) -> Iterator[T]:
        """Each point while there is time; one record of what is left out. ``takes``: seconds that one needs."""
        left = []
        for point in found:
            if self.seconds_left <= takes:
                left.append(str(point))
            else:
                yield point
        if left:
            self.record("points", len(left), status="left out", note=f"no time for {', '.join(left)}")

    @contextmanager
    def attempt(self, what: str, *, ours: bool = True) -> Iterator[None]:
        """A part whose exception becomes a record, so that the rest goes on, unless the device itself is lost.

        What is not ``ours`` may fail: it is only compared with.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.record(what, status="left out", note=f"out of memory: {_first_line(error)}")
        except Exception as error:
            if self.device.lost(error):
                raise
            status: Status = "failed" if ours else "left out"
            self.record(what, status=status, note=f"{type(error).__name__}: {_first_line(error)}")
        finally:
            self.device.free()

    def correct(
        self,
        what: str,
        call: Callable[[], Iterable[Tensor]],
        truth: Iterable[Tensor],
        allowed: float,
        ours: bool = True,
    ) -> bool:
        """Whether ``call`` gives the ``truth``, and, if it is ``ours``, the same bits twice: to be known before speed.

        The error is the larger of the relative error's norm and of the largest error over the largest value.
        """
        first, expected = list(call()), list(truth)
        error = max(relative_error(a, b) for a, b in zip(first, expected, strict=True))
        good = error <= allowed  # not so for NaN
        status: Status = "ok" if good else ("wrong" if ours else "left out")
        note = f"allowed {allowed:g}" + ("" if good else ": no speed")
        self.record(f"{what}: error", error, status=status, note=note, detail=True)
        if good and ours and not all(torch.equal(a, b) for a, b in zip(first, call(), strict=True)):
            self.record(f"{what}: {BITS}", status="wrong", note="no speed")
            return False
        return good

    def timed(self, what: str, calls: Sequence[Call], replays: int = REPLAYS) -> float:
        """Seconds of a call in a graph; where it cannot be captured, which is a record, as the host launches them."""
        try:
            return self.device.seconds(calls, replays)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or self.device.lost(error):
                raise
            note = f"it cannot be captured ({_first_line(error)}): timed as the host launches it"
            self.record(f"{what}: graph", status="note", note=note)
            return self.device.eager_seconds(lambda: [call() for call in calls], replays) / len(calls)

    def fits(self, what: str, needed: float) -> bool:
        """Whether ``needed`` bytes and a tenth more are free; a record if not."""
        free = self.device.free_bytes()
        if needed > free / 1.1:
            note = f"needs {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are free"
            self.record(what, status="left out", note=note)
        return needed <= free / 1.1


def relative_error(found: Tensor, truth: Tensor) -> float:
    """The larger of the error's norm over the truth's, and of the largest error over the largest value."""
    if found.shape != truth.shape:
        raise AssertionError(f"shape {tuple(found.shape)}, wanted {tuple(truth.shape)}")
    error, truth = found.double() - truth.double(), truth.double()
    tiny = torch.finfo(torch.float64).tiny
    norm = error.norm() / truth.norm().clamp_min(tiny)
    return float(torch.maximum(norm, error.abs().max() / truth.abs().max().clamp_min(tiny)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def main(arguments: list[str] | None = None) -> int:
    """Run a stage, or some parts of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.stage")
    parser.add_argument("name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--commit", default="")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", nargs="+")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds - TO_STOP
    try:
        device = find_device(options.rehearse)
    except NoDevice as error:
        print(f"error: {error}")
        return NO_DEVICE
    record = Recorder(options.output / FILE, options.name, environment(options.rehearse, options.commit))
    run = Run(device, record, options.output, deadline)
    torch.manual_seed(SEED)
    module = import_module(f"benchmarks.gpu.{options.name}")
    if options.parts:
        module.run_parts(run, options.parts)
    else:
        module.run(run)
    return int(record.failures > 0)


if __name__ == "__main__":
    sys.exit(main())
