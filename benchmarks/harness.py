"""How every benchmark measures: rounds that alternate with a reference product, so that machines and hours can differ.

A shared machine is slower at one moment than at the next. So each round of a benchmark first times one fixed matrix
product, and the round's ratio to it is what is compared, across providers, runs and machines: `benchmarks.report` and
`make bench-compare` read medians and the 20 % and 80 % quantiles of these ratios.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.memory import peak_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REFERENCE_SIZE = 512 if DEVICE == "cpu" else 4096
FLUSH_BYTES = 256 << 20  # more than a GPU's second-level cache


class Reference:
    """A float32 product of two square matrices, and on a GPU a write of a buffer that empties the cache."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._factor = torch.randn(REFERENCE_SIZE, REFERENCE_SIZE, generator=generator).to(DEVICE)
        self._product = torch.empty_like(self._factor)
        self._flush = torch.empty(FLUSH_BYTES if DEVICE == "cuda" else 0, dtype=torch.uint8, device=DEVICE)
        self.seconds: list[float] = []

    @property
    def flops(self) -> int:
        """Of one product."""
        return 2 * REFERENCE_SIZE**3

    def __call__(self) -> None:
        torch.mm(self._factor, self._factor, out=self._product)  # what was measured before has emptied the caches
        synchronize()
        begin = time.perf_counter()
        torch.mm(self._factor, self._factor, out=self._product)
        synchronize()
        self.seconds.append(time.perf_counter() - begin)
        self._flush.zero_()
        synchronize()


def synchronize() -> None:
    """Wait for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def measure(
    benchmark: Any,
    call: Callable[[], object],
    *,
    kernel: str,
    provider: str,
    mode: str,
    shape: str,
    dtype: str = "float32",
    rounds: int = 15,
    warmup_rounds: int = 3,
    **facts: Any,
) -> None:
    """Time ``call`` in rounds that alternate with the reference product; record time, ratio and peak memory.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: what is measured; it is waited for.
        kernel, provider, mode, shape, dtype: what it is, the columns of the report.
        rounds, warmup_rounds: how often.
        facts: more to record, such as flops or bytes that a formula gives.
    """
    benchmark.group = f"{kernel} {shape} {mode} {dtype}"
    reference = Reference()

    def run() -> None:
        call()
        synchronize()

    peak = peak_bytes(call, DEVICE)
    benchmark.pedantic(run, setup=reference, rounds=rounds, warmup_rounds=warmup_rounds)
    seconds = np.array(benchmark.stats.stats.data)
    ratios = seconds / np.array(reference.seconds[-len(seconds) :])
    low, median, high = np.quantile(ratios, [0.2, 0.5, 0.8])
    benchmark.extra_info |= {
        "kernel": kernel,
        "provider": provider,
        "mode": mode,
        "shape": shape,
        "dtype": dtype,
        "machine": machine(),
        "peak_bytes": peak,
        "ratio": median,
        "ratio_20": low,
        "ratio_80": high,
        "reference_flops": reference.flops,
        **facts,
    }


def machine() -> str:
    """The card's name on a GPU; the processor's and the number of threads that torch uses on a CPU."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except FileNotFoundError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
