"""Uniformity step outside the table: rows gathered, moved by an implementation, rounded, and written back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gif_kernels import checks
from gif_kernels.precision import compute_dtype
from gif_kernels.rounding import stochastic_round
from gif_kernels.sphere import unit
from gif_kernels.uniformity_step.options import UniformityStepOptions

MovedRows = Callable[[Tensor, float, float], tuple[Tensor, Tensor]]
"""(unit rows (n, d), lr, t) -> unit rows after the step, and the loss before it."""


def step_(table: Tensor, index: Tensor, options: UniformityStepOptions, moved_rows: MovedRows) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names by ``moved_rows``; returns the loss before, ().

    A row that would become NaN or infinite stays as it is.
    """
    rows = checks.floating("the rows of table", table[index], ("n", "d"))
    moved, loss = moved_rows(unit(rows.to(compute_dtype(table))), options.lr, options.t)
    norm = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    moves = norm.isfinite() & (norm > 0)  # a step that overflows the norm leaves a row of zeros
    table[index] = torch.where(moves, stochastic_round(moved, table.dtype, index, options.seed), rows)
    return loss
