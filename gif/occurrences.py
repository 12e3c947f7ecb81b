"""Which of its identity's rows a row is."""

from __future__ import annotations

import torch
from torch import Tensor


def occurrences(labels: Tensor) -> Tensor:
    """How often each of ``labels`` (n,) stood there before, (n,) int64: 0 for the first row of an identity."""
    identities, places = labels.sort(stable=True)
    numbers = torch.arange(len(labels), device=labels.device)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[1:] = identities[1:] != identities[:-1]
    before = numbers - torch.where(begins, numbers, 0).cummax(0).values
    return torch.empty_like(numbers).scatter_(0, places, before)
