"""How every benchmark measures: rounds that alternate with references, so that machines and hours can differ.

A shared machine is slower at one moment than at the next. So each round of a benchmark first times one fixed matrix
product and one copy of a large buffer. The round's ratio to the product is what is compared, across providers, runs and
machines: `benchmarks.report` and `make bench-compare` read medians and the 20 % and 80 % quantiles of these ratios. The
roofline is the fastest product of the inputs' dtype that PyTorch's libraries have, and the copy, in the same rounds.
The copy also empties the caches, which a buffer that is used again and again would otherwise be found in.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from benchmarks.memory import peak_bytes, process_bytes
from benchmarks.results import Measurement, Subject
from gif.devices import processor_name

if TYPE_CHECKING:  # a run on a GPU does without it
    from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE_SIZE = 512 if DEVICE == "cpu" else 4096
CLOCK = time.process_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
"""Of one thread the processor's time, which other work on the machine does not count in."""
COPY_BYTES = 64 << 20 if DEVICE == "cpu" else 1 << 30
"""Larger than the caches; on a GPU large enough that the launch does not count."""


class Reference:
    """A float32 product of two square matrices, then a copy of a buffer that is larger than the caches.

    And the ceiling: the same product in ``dtype`` by each library that PyTorch has for it, of which the fastest counts.
    """

    def __init__(self, dtype: str = "float32") -> None:
        generator = torch.Generator().manual_seed(0)
        self._factor = torch.randn(REFERENCE_SIZE, REFERENCE_SIZE, generator=generator).to(DEVICE)
        self._product = torch.empty_like(self._factor)
        self._ways = fastest_products(self._factor.to(getattr(torch, dtype)))
        self.ceiling_seconds: list[float] = []
        self._source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
        self._target = torch.ones_like(self._source)
        self.seconds: list[float] = []
        self.copy_seconds: list[float] = []

    @property
    def flops(self) -> int:
        """How many one product takes."""
        return 2 * REFERENCE_SIZE**3

    @property
    def bytes(self) -> int:
        """How many one copy reads and writes."""
        return 2 * COPY_BYTES

    def __call__(self) -> None:
        torch.mm(self._factor, self._factor, out=self._product)  # the copy before has emptied the caches
        self.seconds.append(_seconds(lambda: torch.mm(self._factor, self._factor, out=self._product)))
        self.ceiling_seconds.append(min(self.seconds[-1:] + [_seconds(way) for way in self._ways for _ in range(2)]))
        self.copy_seconds.append(_seconds(lambda: self._target.copy_(self._source)))


def fastest_products(factor: Tensor) -> list[Callable[[], object]]:
    """Ways to multiply ``factor`` (n, n) by itself that may be the fastest: as PyTorch does, and on a CPU in oneDNN."""
    ways: list[Callable[[], object]] = [lambda: torch.mm(factor, factor)]
    if factor.device.type == "cpu" and torch.backends.mkldnn.is_available() and factor.dtype != torch.float64:
        right = factor.T.contiguous()
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(factor, right, None, "none", [], ""))
    return ways


def _seconds(call: Callable[[], object]) -> float:
    synchronize()
    begin = CLOCK()
    call()
    synchronize()
    return CLOCK() - begin


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(
    benchmark: BenchmarkFixture,
    call: Callable[[], object],
    subject: Subject,
    *,
    rounds: int = 15,
    warmup_rounds: int = 3,
) -> None:
    """Time ``call`` in rounds that alternate with the references; record time, ratios and memory.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: what is measured; it is waited for.
        subject: what that is.
        rounds, warmup_rounds: how often; two more before them look at memory.
    """
    reference = Reference(subject.dtype)

    def run() -> None:
        call()
        synchronize()

    peak = peak_bytes(call, DEVICE)
    process = process_bytes(call, DEVICE)
    benchmark.pedantic(run, setup=reference, rounds=rounds, warmup_rounds=warmup_rounds)
    taken = len(benchmark.stats.stats.data)
    record(
        benchmark,
        subject,
        reference,
        products=reference.seconds[-taken:],
        ceilings=reference.ceiling_seconds[-taken:],
        copies=reference.copy_seconds[-taken:],
        peak_bytes=peak,
        process_bytes=process,
    )


def record(
    benchmark: BenchmarkFixture,
    subject: Subject,
    reference: Reference,
    *,
    products: ArrayLike,
    ceilings: ArrayLike,
    copies: ArrayLike,
    peak_bytes: int,
    process_bytes: int | None = None,
) -> None:
    """Leave the measurement of a benchmark's rounds where the report looks for it.

    ``products``, ``ceilings``, ``copies``: seconds of the references, one a round or one for all.
    """
    seconds = np.array(benchmark.stats.stats.data)
    low, median, high = (float(ratio) for ratio in np.quantile(seconds / np.array(products), [0.2, 0.5, 0.8]))
    measurement = Measurement(
        **vars(subject),
        machine=machine(),
        seconds=float(np.median(seconds)),
        ratio=median,
        ratio_20=low,
        ratio_80=high,
        peak_bytes=peak_bytes,
        process_bytes=process_bytes,
        ceiling_ratio=float(np.median(seconds / np.array(ceilings))),
        copy_ratio=float(np.median(seconds / np.array(copies))),
        reference_flops=reference.flops,
        reference_bytes=reference.bytes,
    )
    benchmark.group = " ".join((subject.kernel, *subject.point))
    benchmark.extra_info |= measurement.to_facts()


def machine() -> str:
    """The card's name on a GPU; the processor's, what torch uses of it and in how many threads on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    used = torch.backends.cpu.get_cpu_capability() + ("" if torch.backends.mkldnn.enabled else " without oneDNN")
    return f"{processor_name()}, {used}, {torch.get_num_threads()} threads"
