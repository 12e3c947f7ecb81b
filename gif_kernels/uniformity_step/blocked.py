"""Uniformity step on the one-sweep loss and gradient."""

from __future__ import annotations

from torch import Tensor

from gif_kernels.gaussian_potential.blocked import potential_and_gradient
from gif_kernels.sphere import inverse_norm
from gif_kernels.uniformity_step import in_rows


def step_(table: Tensor, index: Tensor, lr: float, t: float, seed: int) -> Tensor:
    """Move the rows of ``table`` (m, d) that ``index`` (n,) names; returns the loss before, ()."""
    return in_rows.step_(table, index, lr, t, seed, moved_rows)


def moved_rows(rows: Tensor, lr: float, t: float) -> tuple[Tensor, Tensor]:
    """Unit ``rows`` (n, d) after a step, and the loss before it."""
    loss, gradient = potential_and_gradient(rows, None, 0, t, want_gradient=True)
    moved = rows.add(gradient, alpha=-lr * len(rows))
    return moved.mul_(inverse_norm(moved)), loss
