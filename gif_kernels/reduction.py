"""The reduction of a loss a row to what the caller asked for: their mean, their sum, or none."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["REDUCTIONS", "Reduction", "reduce_rows", "row_weights"]

Reduction = Literal["mean", "sum", "none"]
"""What becomes of the losses of a batch: one number, or one a row."""
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum", "none")
"""Every `Reduction`."""


def reduce_rows(losses: Tensor, counted: Tensor, reduction: Reduction) -> Tensor:
    """Reduce losses (B,) over the rows that are ``counted`` (B,) bool; the others are zero. The specification.

    The mean over no row at all is 0, so that a batch of ignored samples trains nothing and breaks nothing.
    """
    losses = torch.where(counted, losses, 0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)


def row_weights(counted: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """The weight of each row in the reduced loss, (B,): `reduce_rows` is the sum of the losses times these."""
    weights = counted.to(dtype)
    return weights / weights.sum().clamp(min=1) if reduction == "mean" else weights
