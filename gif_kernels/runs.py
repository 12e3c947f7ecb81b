"""Which of several numbers are equal, without waiting for a device to say how many differ."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["first_places", "occurrences", "runs"]


def runs(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``numbers`` (n,) in runs of equal ones: sorted, where each stood before, and whether it begins a run; (n,) each.

    The sort is stable: within a run they stand in the order in which they stood.
    """
    ordered, places = numbers.sort(stable=True)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return ordered, places, begins


def first_places(numbers: Tensor) -> Tensor:
    """Where each of ``numbers`` (n,) stands for the first time, (n,) int64."""
    _, places, begins = runs(numbers)
    return torch.empty_like(places).scatter_(0, places, places[_starts(begins)])


def occurrences(numbers: Tensor) -> Tensor:
    """How often each of ``numbers`` (n,) stood there before, (n,) int64: 0 where it stands for the first time."""
    _, places, begins = runs(numbers)
    before = torch.arange(len(numbers), device=numbers.device) - _starts(begins)
    return torch.empty_like(before).scatter_(0, places, before)


def _starts(begins: Tensor) -> Tensor:
    """Where the run of each begins, (n,) int64."""
    return torch.where(begins, torch.arange(len(begins), device=begins.device), 0).cummax(0).values
