"""Uniformity step, specification: every pair at once, then renormalise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gif_kernels.sphere import inverse_norm, tangent, unit
from gif_kernels.uniformity_step import in_rows
from gif_kernels.uniformity_step.options import UniformityStepOptions


def step_(table: Tensor, index: Tensor, options: UniformityStepOptions) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names; returns the loss before, ()."""
    return in_rows.step_(table, index, options, moved_rows)


def moved_rows(rows: Tensor, lr: float, t: float) -> tuple[Tensor, Tensor]:
    """Unit ``rows`` (n, d) after a step, and the loss before it."""
    n = len(rows)
    pairs = torch.exp(2 * t * (rows @ rows.T - 1)).fill_diagonal_(0)  # (n, n)
    total = pairs.sum()
    gradient = tangent(4 * t / total * pairs @ rows, rows, inverse_norm(rows))
    return unit(rows - lr * n * gradient), total.log() - math.log(n * (n - 1))
