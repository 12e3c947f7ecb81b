"""How much memory a call takes beyond what was there before it, and how much of it stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Largest number of bytes that ``call`` held at once: the caching allocator's count on CUDA, its record on CPU."""
    return _bytes(call, device)[0]


def kept_bytes(call: Callable[[], object], device: str) -> int:
    """Bytes that ``call`` took and did not give back; it must keep what it made alive."""
    return _bytes(call, device)[1]


def _bytes(call: Callable[[], object], device: str) -> tuple[int, int]:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak, held
