"""Vector step on gathered rows: nothing of the table's size is read, written or allocated."""

from __future__ import annotations

import torch
from torch import Tensor

from gif_kernels import checks
from gif_kernels.precision import compute_dtype
from gif_kernels.rounding import stochastic_round
from gif_kernels.runs import first_places


def step_(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: int | Tensor, lr: float
) -> Tensor:
    """Move the rows of ``table`` (n, d) that ``rows`` (B,) names; returns how many of them stayed, ()."""
    rows, step, stands = _summed(rows, gradient.to(compute_dtype(table, gradient)))
    before = table.index_select(0, rows)  # faster on a CPU than table[rows]
    moved = step.mul_(-lr).add_(before)
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    # NaN and infinity anywhere in a row reach its norm; nothing stands where no row is named
    moves = norm.isfinite() & (norm > 0) & stands.any()
    names = rows if row_ids is None else row_ids[rows]
    moved = stochastic_round(moved, table.dtype, names, seed)
    if not (checks.looks_at_values(moves) and bool(moves.all())):
        moved = torch.where(moves, moved, before)
    table[rows] = moved
    return (~moves.squeeze(1) & stands).sum()


def _summed(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (k,) of the table, the sum of the gradients (B, d) of each, and which of them stand for the first time.

    On a CPU without repeats. On an accelerator, where the host would wait for their number, with them: each repeat has
    the whole sum, so it is the same row that is written twice. Sums have a fixed order.
    """
    if not checks.looks_at_values(rows):
        return _summed_with_repeats(rows, gradient)
    named = rows >= 0
    if not bool(named.all()):
        rows, gradient = rows[named], gradient[named]
    distinct, place = rows.unique(return_inverse=True)
    sums = gradient.new_zeros(len(distinct), gradient.shape[1]).index_add_(0, place, gradient)
    return distinct, sums, torch.ones_like(distinct, dtype=torch.bool)


def _summed_with_repeats(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_summed`, in sizes that no value decides. What is skipped repeats the last row, and adds nothing to it."""
    last, skipped = rows.max(), rows < 0
    rows = torch.where(skipped, last.clamp(min=0), rows)
    gradient = gradient.masked_fill(skipped[:, None], 0)
    place = first_places(rows)
    sums = torch.zeros_like(gradient).index_put_((place,), gradient, accumulate=True)
    return rows, sums[place], (place == torch.arange(len(rows), device=rows.device)) & (last >= 0)
