"""Vector step on gathered rows: nothing of the table's size is read, written or allocated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gif_kernels import checks
from gif_kernels.precision import compute_dtype
from gif_kernels.rounding import stochastic_round
from gif_kernels.runs import first_places, runs


def step_(
    table: Tensor, rows: Tensor, gradient: Tensor, row_ids: Tensor | None, seed: int | Tensor, lr: float
) -> Tensor:
    """Move the rows of ``table`` (n, d) that ``rows`` (B,) names; returns how many of them stayed, ()."""
    rows, step, stands = _summed(rows, gradient.to(compute_dtype(table, gradient)))
    largest = torch.finfo(step.dtype).max
    rate = lr if abs(lr) <= largest else math.copysign(math.inf, lr)  # PyTorch refuses numbers that a dtype has not
    moved = table.index_select(0, rows).to(step.dtype).sub_(step, alpha=rate)  # on a CPU faster than table[rows]
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    # NaN and infinity anywhere in a row reach its norm; nothing stands where no row is named
    moves = norm.isfinite() & (norm > 0) & stands.any()
    names = rows if row_ids is None else row_ids[rows]
    moved = stochastic_round(moved, table.dtype, names, seed)
    if not checks.looks_at_values(moves):
        moved = torch.where(moves, moved, table.index_select(0, rows))
    elif not bool(moves.all()):
        rows, moved = rows[moves.squeeze(1)], moved[moves.squeeze(1)]
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
    ordered, places, begins = runs(rows)
    if not bool(begins.all()):
        run, repeats = begins.cumsum(0).sub_(1), ~begins
        sums = gradient.index_select(0, places[begins])
        gradient = sums.index_add_(0, run[repeats], gradient.index_select(0, places[repeats]))
        rows = ordered[begins]
    return rows, gradient, torch.ones_like(rows, dtype=torch.bool)


def _summed_with_repeats(rows: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `_summed`, in sizes that no value decides. What is skipped repeats the last row, and adds nothing to it."""
    last, skipped = rows.max(), rows < 0
    rows = torch.where(skipped, last.clamp(min=0), rows)
    gradient = gradient.masked_fill(skipped[:, None], 0)
    place = first_places(rows)
    sums = torch.zeros_like(gradient).index_put_((place,), gradient, accumulate=True)
    return rows, sums[place], (place == torch.arange(len(rows), device=rows.device)) & (last >= 0)
