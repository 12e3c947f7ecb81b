"""Everything that the stages want of CUDA, and the same for a rehearsal on a CPU.

`Cuda` times by events around replays of a graph, the median of many, never by a host clock. `Rehearsal` runs the same
code at a host clock, which says nothing and is marked so in every record.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import psutil
import pynvml
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.records import ROOT
from benchmarks.memory import nvml_bytes

T = TypeVar("T")
Call = Callable[[], object]
REPLAYS = 20
WARM_UP = 3
MOST_COPIES = 64
"""How many inputs take turns at most, so that none is found in the L2 cache."""
MOST_PROCESSES = 15
"""Side by side, whatever the cores: each has a context of half a GiB on the card."""
SLEEP_CYCLES = 50_000_000
"""Some 30 ms, in which whatever did not wait for its stream would be done."""


class NoDevice(Exception):
    """There is no GPU."""


class Device(Protocol):
    """What a stage may ask for."""

    name: str
    """As torch names it: "cuda" or "cpu"."""
    low: torch.dtype
    """The low precision that is measured: bfloat16; float16 where Triton is interpreted, in NumPy."""
    impl: Literal["auto", "triton"]
    """What makes a public function run its kernel."""
    cores: int
    """Processes to run side by side."""

    def copies(self, size: int) -> int:
        """How many inputs of ``size`` bytes must take turns so that none stays in the L2 cache."""

    def seconds(self, calls: Sequence[Call], replays: int = REPLAYS) -> float:
        """Median time of a call, each captured once in one graph that is replayed."""

    def eager_seconds(self, call: Call, repeats: int = REPLAYS) -> float:
        """Median time of a call as the host launches it, by events before and after."""

    def launches(self, call: Call) -> int:
        """Kernels, copies and fills that a call puts on the device."""

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        """torch.compile, as this device would be served."""

    def waits(self, call: Call) -> Counter[str]:
        """Places of this project, "file:line", where the host waits for the device in a call, and how often."""

    def captured(self, call: Call) -> None:
        """Capture a call in a graph and replay it; raises what the capture raises."""

    def beside(self, call: Callable[[], T]) -> T:
        """The result of a call in a stream that is not the default one, behind work that is still going on there."""

    def reset_peak(self) -> None:
        """Forget what was allocated at once before."""

    def peak_bytes(self) -> int:
        """The most that was allocated at once since, by PyTorch."""

    def held_bytes(self) -> tuple[int, str]:
        """What the card holds by NVML, and whose it is: of this process where NVML says so, else of all."""

    def free_bytes(self) -> int:
        """What is free on the device."""

    def free(self) -> None:
        """Give back what is no longer used."""

    def lost(self, error: Exception) -> bool:
        """Whether after ``error`` nothing works any more in this process."""

    def kernel_flags(self) -> list[str]:
        """For pytest: which tests to take."""


def find_device(rehearsal: bool) -> Device:
    """The card, or a CPU in its place; NoDevice where there is no card."""
    return Rehearsal() if rehearsal else Cuda()


class Cuda:
    """The current card."""

    name = "cuda"
    low = torch.bfloat16
    impl: Literal["auto", "triton"] = "auto"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NoDevice("torch sees no GPU here; --rehearse runs every stage on a CPU")
        self.cores = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1))
        self._l2 = torch.cuda.get_device_properties().L2_cache_size

    def copies(self, size: int) -> int:
        return max(1, min(MOST_COPIES, math.ceil(2 * self._l2 / size)))

    def seconds(self, calls: Sequence[Call], replays: int = REPLAYS) -> float:
        graph = self._graph(calls)
        taken = statistics.median(self._events(graph.replay, replays)) / len(calls)
        del graph
        return taken

    def _graph(self, calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                calls[0]()
            for call in calls[1:]:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        return graph

    def _events(self, call: Call, repeats: int) -> list[float]:
        pairs = []
        for _ in range(repeats):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]

    def eager_seconds(self, call: Call, repeats: int = REPLAYS) -> float:
        for _ in range(min(WARM_UP, repeats - 1)):
            call()
        torch.cuda.synchronize()
        return statistics.median(self._events(call, repeats))

    def launches(self, call: Call) -> int:
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            torch.cuda.synchronize()
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        return torch.compile(function, dynamic=False)

    def waits(self, call: Call) -> Counter[str]:
        call()
        torch.cuda.synchronize()
        found: Counter[str] = Counter()

        def seen(message: Warning | str, *_: Any, **__: Any) -> None:
            if "synchroniz" in str(message) and "prototype feature" not in str(message):
                found[_place(traceback.extract_stack())] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = seen  # catch_warnings puts it back
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return found

    def captured(self, call: Call) -> None:
        self._graph([call]).replay()
        torch.cuda.synchronize()

    def beside(self, call: Callable[[], T]) -> T:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP_CYCLES)
            found = call()
        stream.synchronize()
        return found

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()

    def held_bytes(self) -> tuple[int, str]:
        own = nvml_bytes()
        if own is not None:
            return own, "of this process"
        pynvml.nvmlInit()
        try:
            card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            return int(pynvml.nvmlDeviceGetMemoryInfo(card).used), "of the card, all processes"
        except pynvml.NVMLError:
            free, total = torch.cuda.mem_get_info()
            return total - free, "of the card, all processes, by the driver"
        finally:
            pynvml.nvmlShutdown()

    def free_bytes(self) -> int:
        self.free()
        return torch.cuda.mem_get_info()[0]

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def lost(self, error: Exception) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def kernel_flags(self) -> list[str]:
        return ["-m", "gpu"]


class Rehearsal:
    """A CPU that goes through the same motions."""

    name = "cpu"
    low = torch.float16
    impl: Literal["auto", "triton"] = "triton"
    cores = 1

    def copies(self, size: int) -> int:
        return 1

    def seconds(self, calls: Sequence[Call], replays: int = REPLAYS) -> float:
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)

    def eager_seconds(self, call: Call, repeats: int = REPLAYS) -> float:
        return self.seconds([call])

    def launches(self, call: Call) -> int:
        call()
        return 0

    def compile(self, function: Callable[..., T]) -> Callable[..., T]:
        return torch.compile(function, backend="eager")

    def waits(self, call: Call) -> Counter[str]:
        call()
        return Counter()

    def captured(self, call: Call) -> None:
        call()

    def beside(self, call: Callable[[], T]) -> T:
        return call()

    def reset_peak(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return 0

    def held_bytes(self) -> tuple[int, str]:
        return psutil.Process().memory_info().rss, "of this process, resident"

    def free_bytes(self) -> int:
        return psutil.virtual_memory().available

    def free(self) -> None:
        gc.collect()

    def lost(self, error: Exception) -> bool:
        return False

    def kernel_flags(self) -> list[str]:
        return []


def _place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame of this project's packages, and of whom it called outside where that is another file."""
    own = [frame for frame in stack if _inside(frame.filename)]
    if not own:
        return "outside this project"
    return f"{Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}"


def _inside(name: str) -> bool:
    return any(Path(name).is_relative_to(ROOT / package) for package in ("gif", "gif_kernels"))


def rotated(device: Device, make: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Inputs that take turns: as many as are larger, together, than the L2 cache twice."""
    first = make()
    size = sum(x.nbytes for x in first)
    return [first, *(make() for _ in range(device.copies(size) - 1))]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may round their operands to TF32, in the block."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = (
        allowed  # not fp32_precision alone: torch.compile reads this one, which refuses to differ from it
    )
    try:
        yield
    finally:
        matmul.allow_tf32 = before
