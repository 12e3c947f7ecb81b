"""Uniformity step outside the table: rows gathered, moved by an implementation, rounded, and written back."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gif_kernels import checks
from gif_kernels.rounding import stochastic_round
from gif_kernels.sphere import compute_dtype, unit

MovedRows = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
"""(unit rows (n, d), lr, t) -> unit rows after the step, and the loss before it."""


def step_(table: Tensor, index: Tensor, lr: float, t: float, seed: int, moved_rows: MovedRows) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names by ``moved_rows``; returns the loss before, ()."""
    rows = checks.floating("the rows of table", table[index], ("n", "d"))
    moved, loss = moved_rows(unit(rows.to(compute_dtype(table))), lr, t)
    table[index] = stochastic_round(moved, table.dtype, index, seed)
    return loss
