"""How much memory a call takes beyond what was there before it, how much of it stays, and how much there is."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pynvml
import pytest
import torch

from benchmarks.resident import ResidentMemory
from gif.planning.memory import free_bytes, kept_bytes, peak_bytes

__all__ = ["free_bytes", "kept_bytes", "nvml_bytes", "peak_bytes", "process_bytes", "skip_unless_it_fits"]


def process_bytes(call: Callable[[], object], device: str) -> int | None:
    """What the operating system or the driver counts, whoever allocated it.

    On CPU the most resident memory during ``call``, beyond what there was. On CUDA all that the process holds on the
    card by NVML, context and libraries included, after ``call`` began with an empty cache; None where NVML is absent
    or does not show this process, as in many containers.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        call()
        torch.cuda.synchronize()
        return nvml_bytes()
    with ResidentMemory() as memory:
        call()
    return memory.peak


def nvml_bytes() -> int | None:
    """Bytes of this process on torch's current card by NVML, None where NVML is absent or does not show the process."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:  # no NVIDIA driver
        return None
    try:
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(card)
    except pynvml.NVMLError:  # a part of a card, or a driver that does not say
        return None
    finally:
        pynvml.nvmlShutdown()
    return next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)


def skip_unless_it_fits(what: str, needed: float, device: str) -> None:
    """Skip the test, saying what ``what`` needs, unless ``needed`` bytes and a quarter more are free."""
    free = free_bytes(device)
    if needed > 0.8 * free:
        pytest.skip(f"{what} needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free")
