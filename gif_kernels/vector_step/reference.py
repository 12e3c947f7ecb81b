"""Vector step, specification: gradients added one by one, then every row that is named moves or stays."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels.precision import compute_dtype
from gif_kernels.rounding import stochastic_round


def step_(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: int | Tensor, lr: float
) -> Tensor:
    """Move the rows of ``table`` (n, d) that ``rows`` (B,) names; returns how many of them stayed, ()."""
    sums = torch.zeros(table.shape, dtype=compute_dtype(table, gradient), device=table.device)
    named = torch.zeros(len(table), dtype=torch.bool, device=table.device)
    for place, row in enumerate(rows.tolist()):
        if row >= 0:
            sums[row] += gradient[place]
            named[row] = True
    moved = table - lr * sums
    norm = torch.linalg.vector_norm(moved, dim=1)
    moves = named & norm.isfinite() & (norm > 0)
    names = torch.arange(len(table), device=table.device) if row_ids is None else row_ids
    table.copy_(torch.where(moves[:, None], stochastic_round(moved, table.dtype, names, seed), table))
    return (named & ~moves).sum()
