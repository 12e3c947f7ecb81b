"""From a loss a row to what the caller asked for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")


def reduce_rows(losses: Tensor, counted: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses (B,) over the rows that are ``counted`` (B,) bool (None: all); the others are zero.

    The mean over no row at all is 0, so that a batch of ignored samples trains nothing and breaks nothing.
    """
    if counted is not None:
        losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (max(len(losses), 1) if counted is None else counted.sum().clamp(min=1))
