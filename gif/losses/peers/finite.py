"""What must not enter a memory that outlives its step."""

from __future__ import annotations

import torch
from torch import Tensor


def finite_rows(rows: Tensor) -> Tensor:
    """The rows (n, d) in float32, with zeros for each that is not finite, as after an overflow in float16."""
    rows = rows.detach().float()
    return torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
