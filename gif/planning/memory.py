"""How much memory a call takes beyond what was there before it, how much of it stays, and how much there is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from gif.packages import needs


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Largest number of bytes that ``call`` held at once: the caching allocator's count on CUDA, its record on CPU."""
    return _bytes(call, device)[0]


def kept_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes that ``call`` took and did not give back; it must keep what it made alive."""
    return _bytes(call, device)[1]


def free_bytes(device: str) -> int:
    """Memory that is free for a call."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with needs("psutil", "a look at how much memory is free"):
        import psutil
    return psutil.virtual_memory().available


def _bytes(call: Callable[[], object], device: str) -> tuple[int, int]:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, held
